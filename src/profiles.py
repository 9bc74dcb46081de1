"""The three profiles, `sample`, `mini` and `small`, and the settings made from one of them and overrides.

A stage's settings are `settings_for(profile, overrides)`: nothing is patched afterwards, so the settings a manifest
records can be derived again and compared.
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from src.config import CorpusSettings, FinetuningSettings, LabelledSettings, ModelSettings, PretrainingSettings, require

# Further span corruption on sentences: short texts have more sentinels, so longer targets beside their inputs.
ADAPTATION = PretrainingSettings(
    inputs_length=256,
    targets_length=80,
    learning_rate=1e-2,
    weight_decay=0.0,
    rows_per_step=8,
    rows_per_micro_batch=8,
    max_epochs=5,
    warmup_steps=10,
    evaluate_every=100,
    validation_rows=64,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sections of one profile, and the overrides that were applied to it."""

    profile: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    labelled: LabelledSettings = field(default_factory=LabelledSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    pretraining: PretrainingSettings
    adaptation: PretrainingSettings = ADAPTATION  # further span corruption on labelled texts, in `compare`
    classification: FinetuningSettings
    text_to_text: FinetuningSettings

    def section(self, name: str) -> dict[str, Any]:
        """One section as plain JSON values (tuples become lists)."""
        values = asdict(getattr(self, name))
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


# Both ways of fine-tuning `mini` and `small`; the head has no targets.
FINETUNING = FinetuningSettings(
    learning_rate=1e-3,
    other_rate=0.3,
    inputs_length=128,  # long enough for nearly any sentence; attention over longer rows costs more
    targets_length=48,
    rows_per_step=16,
    rows_per_micro_batch=16,
    max_epochs=5,
    warmup_steps=20,
    evaluate_every=100,
)

PROFILES = {
    # Finishes on two CPU cores within minutes: it shows the way, not the quality.
    "sample": Settings(
        profile="sample",
        corpus=CorpusSettings(path="sample", min_words=5, vocab_size=1_200, validation_fraction=0.05),
        labelled=LabelledSettings(path="sample"),
        model=ModelSettings(d_model=96, d_kv=24, d_ff=256, num_heads=4, num_layers=2, num_decoder_layers=2),
        pretraining=PretrainingSettings(
            inputs_length=256,
            targets_length=59,
            learning_rate=5e-2,
            rows_per_step=8,
            rows_per_micro_batch=8,
            max_steps=500,
            warmup_steps=25,
            evaluate_every=50,
            checkpoint_every=100,
            validation_rows=48,
            labelled_share=0.1,
            precision="fp32",  # in bf16 a model this small learns which events are good or bad news some hundred steps later
        ),
        classification=FinetuningSettings(
            learning_rate=1.5e-3,
            full_learning_rate=3e-2,
            dropout_rate=0.0,
            inputs_length=256,
            rows_per_step=2,
            rows_per_micro_batch=2,
            max_epochs=6,
            warmup_steps=20,
            evaluate_every=100,
            precision="fp32",
        ),
        text_to_text=FinetuningSettings(
            learning_rate=2e-3,
            full_learning_rate=3e-2,
            dropout_rate=0.0,
            inputs_length=256,
            targets_length=48,
            rows_per_step=4,
            rows_per_micro_batch=4,
            max_epochs=3,
            warmup_steps=20,
            evaluate_every=100,
        ),
    ),
    # 13M parameters: learns something real from a few hours of two CPU cores.
    "mini": Settings(
        profile="mini",
        model=ModelSettings(d_model=256, d_kv=64, d_ff=1024, num_heads=4, num_layers=6, num_decoder_layers=6),
        pretraining=PretrainingSettings(
            rows_per_micro_batch=8,
            max_minutes=120,
            warmup_steps=50,
            evaluate_every=250,
            checkpoint_every=250,
            compile=True,
        ),
        classification=FINETUNING,
        text_to_text=FINETUNING,
    ),
    # The widths of T5-small; wants a GPU.
    "small": Settings(
        profile="small",
        pretraining=PretrainingSettings(
            rows_per_step=64,
            rows_per_micro_batch=64,
            max_epochs=5,
            warmup_steps=100,
            evaluate_every=500,
            checkpoint_every=500,
            compile=True,
        ),
        classification=FINETUNING,
        text_to_text=FINETUNING,
    ),
}


PYTHON_CONSTANTS = {"None": None, "True": True, "False": False}


def typed(key: str, value: Any, expected: Any) -> Any:
    """An overriding value as the type that its field declares: a list becomes a tuple, an integer may stand for a float."""
    choices = get_args(expected) if isinstance(expected, UnionType) else (expected,)
    if any(get_origin(choice) is tuple for choice in choices) and isinstance(value, list | tuple):
        return tuple(value)
    if float in choices and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = any(choice is bool if isinstance(value, bool) else isinstance(value, choice) for choice in choices if isinstance(choice, type))
    require(right, f"setting {key} is {value!r}, a {type(value).__name__}: expected {getattr(expected, '__name__', expected)}")
    return value


def parse_value(text: str) -> Any:
    """A setting's value as written on a command line: JSON or a constant of Python where it is one, else the text itself."""
    if text in PYTHON_CONSTANTS:
        return PYTHON_CONSTANTS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def add_settings_options(parser: argparse.ArgumentParser, profile: str, about: str = "any other setting") -> None:
    """`--profile` and `--set`, as all commands spell them; `settings_for(options.profile, parse_overrides(options.set))` reads them.

    Args:
        profile: the one that is meant where none is given.
        about: which settings the command reads.
    """
    parser.add_argument("--profile", default=profile, choices=sorted(PROFILES))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=about)


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """`["pretraining.seed=3", "classification.method=lora"]` as the overrides that `settings_for` takes."""
    split = (pair.partition("=") for pair in pairs)
    return {key: parse_value(value) for key, _, value in split}


def settings_for(profile: str, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings of a profile with some fields replaced.

    Args:
        profile: a key of `PROFILES`.
        overrides: `{"section.field": value}`, e.g. `{"corpus.path": "news.csv", "pretraining.max_minutes": 10}`.

    Raises:
        SettingsError: unknown profile, section or field, or a value that the section refuses.
    """
    require(profile in PROFILES, f"profile {profile!r} is unknown: choose one of {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    changes: dict[str, dict[str, Any]] = {}
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        known = [f.name for f in fields(getattr(settings, section))] if section in SECTIONS else []
        hint = f"{section} has {', '.join(known)}" if known else f"sections are {', '.join(SECTIONS)}"
        require(name in known, f"setting {key!r} is unknown: {hint}")
        changes.setdefault(section, {})[name] = typed(key, value, get_type_hints(type(getattr(settings, section)))[name])
    sections = {section: replace(getattr(settings, section), **values) for section, values in changes.items()}
    for section, values in changes.items():
        for name in ("optimizer", "learning_rate"):
            own = getattr(sections[section], "method", None) == "full" and getattr(sections[section], f"full_{name}") is not None
            passed_over = own and name in values and f"full_{name}" not in values
            require(not passed_over, f"{section}.{name} is for adapters: with {section}.method=full give {section}.full_{name}")
    return replace(settings, overrides=dict(overrides or {}), **sections)


SECTIONS = tuple(f.name for f in fields(Settings) if f.name not in ("profile", "overrides"))


def artifacts_folder(profile: str) -> Path:
    """Where a profile's artifacts lie: `artifacts/<profile>`, or under `$ARTIFACTS_DIR`."""
    return Path(os.environ.get("ARTIFACTS_DIR", "artifacts")) / profile
