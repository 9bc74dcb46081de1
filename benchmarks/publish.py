"""Keep a profile's pre-trained model under `results/`: `python -m benchmarks.publish mini [NAME]`, by the profile's name or another.

`results/NAME/` is the checkpoint in bf16, half the size, with its log and figures; `results/pretrained_NAME.json` says by which command,
from which data and on which machine it was made. `python -m src.pipeline compare --base results/NAME` starts from it.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from datetime import date
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_NAME

from benchmarks.record import RESULTS
from src.artifacts import ArtifactError, data_digest, open_artifact, published_value
from src.config import SettingsError
from src.modeling_t5 import T5ForConditionalGeneration
from src.pipeline import OPTIONS
from src.profiles import settings_for
from src.verified_folders import MANIFEST, atomic_folder


def make_command(profile: str, overrides: Mapping[str, Any]) -> str:
    """The `make run` that these overrides come from; those that change nothing are left out."""
    default, variables, sets = settings_for(profile), {"PROFILE": profile}, []
    options = {key: option.upper() for option, (key, _) in OPTIONS.items()}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if getattr(getattr(default, section), name) == value:
            continue
        shown = published_value(value) if isinstance(value, str) else json.dumps(value)
        if key == "pretraining.initialisation" and shown != value:  # a folder has to look like one
            shown = f"./{shown}"
        if key in options:
            variables[options[key]] = shown
        else:
            sets.append(f"{key}={shown}")
    if sets:
        variables["SET"] = " ".join(sets)
    return "make run " + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def publish(profile: str, name: str) -> dict[str, Any]:
    """Copy the artifact to `results/<name>` and write its record; returns the record."""
    settings = settings_for(profile)
    pretrained, dataset = (open_artifact(settings, kind) for kind in ("pretrained", "pretraining_dataset"))
    record = {
        "command": make_command(profile, dataset.manifest["overrides"] | pretrained.manifest["overrides"]),
        "date": date.today().isoformat(),
        "machine": pretrained.manifest["machine"],
        "seed": pretrained.manifest["settings"]["pretraining"]["seed"],
        "data_sha256": data_digest(dataset.manifest["sources"]),
        "packages": pretrained.manifest["packages"],
        "result": json.loads((pretrained.path / "metrics.json").read_text(encoding="utf-8")),
    }
    with atomic_folder(RESULTS / name, {"artifact": "pretrained", "inputs": pretrained.manifest["inputs"]}) as folder:
        shutil.copytree(pretrained.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, SAFE_WEIGHTS_NAME))
        T5ForConditionalGeneration.from_pretrained(pretrained.path, dtype=torch.bfloat16).save_pretrained(folder)
    (RESULTS / f"pretrained_{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print("usage: python -m benchmarks.publish PROFILE [NAME]", file=sys.stderr)
        return 2
    try:
        print(json.dumps(publish(sys.argv[1], sys.argv[-1])["result"]))
    except (ArtifactError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
