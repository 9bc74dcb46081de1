"""Which notebook makes which artifacts from which, in order, and by which settings."""

from dataclasses import dataclass

from src.config import SettingsError


@dataclass(frozen=True)
class Stage:
    """One notebook: what it reads, what it makes, and which settings shape it."""

    notebook: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    sections: tuple[str, ...]


STAGES = (
    Stage("prepare_unsupervised_dataset_for_pretraining.ipynb", ("tokenizer", "pretraining_dataset"), (), ("corpus",)),
    Stage("prepare_supervised_dataset_for_finetuning.ipynb", ("finetuning_dataset",), ("tokenizer", "pretraining_dataset"), ("labelled",)),
    Stage("pretrain_t5_small.ipynb", ("pretrained",), ("tokenizer", "pretraining_dataset"), ("model", "pretraining")),
    Stage("finetune_classification_head.ipynb", ("classification_head",), ("finetuning_dataset", "pretrained"), ("classification",)),
    Stage("finetune_text_to_text.ipynb", ("text_to_text",), ("finetuning_dataset", "pretrained", "classification_head"), ("text_to_text",)),
)


def stage_of(artifact: str) -> Stage:
    """The stage that makes an artifact."""
    for stage in STAGES:
        if artifact in stage.outputs:
            return stage
    raise SettingsError(f"artifact {artifact!r} is unknown: stages make {', '.join(a for s in STAGES for a in s.outputs)}")
