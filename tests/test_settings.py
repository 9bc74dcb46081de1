"""Settings are frozen and checked, and labels are never guessed."""

import dataclasses

import pytest

from src.config import SettingsError
from src.labels import LABELS, TWITTER_LABEL_MAP, YAHOO_LABEL_MAP, LabelError, label_id, parse_label_map
from src.profiles import PROFILES, parse_overrides, settings_for
from src.stages import STAGES, stage_of


def test_overrides_replace_fields_and_leave_the_profile_alone():
    """A profile patched in place would leak one run's options into the next."""
    changed = settings_for("mini", {"corpus.path": "news.csv", "labelled.split_fractions": [0.8, 0.1, 0.1]})
    assert (changed.corpus.path, changed.labelled.split_fractions) == ("news.csv", (0.8, 0.1, 0.1))
    assert PROFILES["mini"].corpus.path == "hub"
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.corpus.seed = 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"corpus.pth": "x"}, "'corpus.pth' is unknown: corpus has path"),
        ({"corpora.path": "x"}, "sections are corpus"),
        ({"corpus.vocab_size": 70_000}, "300..65536"),
        ({"labelled.split_fractions": [0.8, 0.1]}, "train, validation, test"),
        ({"labelled.split_fractions": [0.8, 0.1, 0.2]}, "add up to 1"),
        ({"labelled.label_map": "0=good"}, "LABEL one of bearish, neutral, bullish"),
        ({"pretraining.max_steps": None}, "max_steps, max_epochs or max_minutes"),
        ({"pretraining.max_steps": -5}, "each positive or null"),
        ({"pretraining.rows_per_step": 17}, "multiple of rows_per_micro_batch"),
        ({"pretraining.rows_per_micro_batch": 0}, "rows_per_micro_batch must be positive"),
        ({"classification.evaluate_every": 0}, "evaluate_every must be positive: a number larger"),
        ({"pretraining.schedule": "cosin"}, "schedule 'cosin' is unknown: choose one of cosine"),
        ({"model.relative_attention_num_buckets": 7}, "even and at least 4"),
        ({"model.relative_attention_max_distance": 16}, "more than half the number of buckets"),
        ({"pretraining.labelled_share": 1.0}, "lie in"),
        ({"pretraining.labelled_share": 0.1, "pretraining.packing": "concatenate"}, "packing=best_fit"),
        ({"classification.method": "qlora8"}, "full, lora or qlora"),
        ({"classification.max_gradient_norm": 0}, "max_gradient_norm must be positive: a large number"),
        ({"pretraining.early_stop_evaluations": -1}, "early_stop_evaluations must be positive or null"),
        ({"model.num_layers": 0}, "widths, heads and layers must be positive"),
        ({"pretraining.inputs_length": 0}, "pretraining.inputs_length must be positive"),
        ({"classification.optimizer": "sgd"}, "optimizer 'sgd' is unknown: choose one of adamw"),
        ({"classification.full_optimizer": "sgd"}, "full_optimizer 'sgd' is unknown"),
        ({"classification.inputs_length": 4}, "inputs_length must be at least 16"),
        ({"classification.lora_rank": 0}, "lora_rank must be positive"),
        ({"labelled.near_duplicate_threshold": 60}, r"labelled.near_duplicate_threshold must lie in \(0, 1\]"),
        ({"labelled.max_documents": 0}, "labelled.max_documents must be positive"),
        (
            {"classification.method": "full", "classification.learning_rate": 0.1},
            "with classification.method=full give classification.full_learning_rate",
        ),
        ({"corpus.max_documents": "many"}, "corpus.max_documents"),
    ],
)
def test_bad_settings_are_refused_in_one_line(overrides, message):
    """A misspelt or senseless setting that is ignored costs a night of training."""
    with pytest.raises(ValueError, match=message) as error:
        settings_for("sample", overrides)
    assert "\n" not in str(error.value)


def test_settings_of_a_command_line_are_written_as_json_or_as_in_python():
    """`max_minutes=None` taken as a text names a value that no setting can have."""
    pairs = ["pretraining.max_minutes=None", "pretraining.compile=True", "corpus.tokenizer=null", "pretraining.seed=3", "corpus.path=a=b"]
    assert list(parse_overrides(pairs).values()) == [None, True, None, 3, "a=b"]


def test_a_method_leaves_the_epochs_alone():
    """Taken again at each step of the way, they would undo what a share of the labels asks for: a curve of undertrained models."""
    adapters = settings_for("mini").text_to_text
    full = adapters.with_method("full")
    assert adapters.with_method("lora").max_epochs == full.max_epochs == adapters.max_epochs
    assert dataclasses.replace(full, max_epochs=50).with_method("full").max_epochs == 50


@pytest.mark.parametrize("section", ["classification", "text_to_text"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_method_can_be_named_alone(section, method):
    """A check of what goes with `full` once asked for a field that was gone: nobody could choose it."""
    for profile in PROFILES:
        assert getattr(settings_for(profile, {f"{section}.method": method}), section).method == method


def test_unknown_profile_and_artifact():
    """The error lists what there is."""
    with pytest.raises(SettingsError, match="sample, mini, small"):
        settings_for("huge")
    with pytest.raises(SettingsError, match="finetuning_dataset"):
        stage_of("tokeniser")


def test_stages_read_only_what_earlier_stages_made():
    """The order of STAGES is the order in which they run."""
    made = set()
    for stage in STAGES:
        assert set(stage.inputs) <= made
        made |= set(stage.outputs)


def test_label_orders_of_the_known_sources():
    """Yahoo's 0 is bullish and Twitter's 0 is bearish: mixing them up turns every score upside down."""
    assert [LABELS[label_id(i, YAHOO_LABEL_MAP)] for i in (0, 1, 2)] == ["bullish", "neutral", "bearish"]
    assert [LABELS[label_id(i, TWITTER_LABEL_MAP)] for i in (0, 1, 2)] == ["bearish", "bullish", "neutral"]
    assert [LABELS[label_id(v)] for v in ("positive", " Negative", "NEUTRAL")] == ["bullish", "bearish", "neutral"]
    assert label_id(2.0, parse_label_map("0=bearish,1=bullish,2=neutral")) == 1


@pytest.mark.parametrize(
    ("value", "label_map"), [(0, None), ("1", None), ("good", None), (3, YAHOO_LABEL_MAP), ("positive", YAHOO_LABEL_MAP), (None, None)]
)
def test_a_label_without_a_meaning_is_an_error(value, label_map):
    """An integer that is guessed is wrong for one of the two public sources."""
    with pytest.raises(LabelError):
        label_id(value, label_map)
