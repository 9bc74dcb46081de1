"""Further span corruption on the texts of a task before fine-tuning on their labels (task-adaptive pre-training, arXiv 2004.10964).

News articles and the sentences that people label are not quite one language. Some epochs of the pre-training task on the training
texts themselves, without their labels, bring a checkpoint closer. The price is a copy of the checkpoint for every set of texts.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.collators import PretrainingBatches, encode
from src.config import PretrainingSettings
from src.finetuned_checkpoints import quiet_transformers
from src.modeling_t5 import T5ForConditionalGeneration
from src.pretraining import SpanCorruptionEvaluation
from src.qlora import base_digest
from src.tokenizer import copy_sentencepiece, load_tokenizer
from src.training import train
from src.verified_folders import ArtifactError, atomic_folder, verify_folder


@dataclass(frozen=True)
class Texts:
    """Tokenized texts without eos, as `PretrainingBatches` reads them."""

    token_ids: list[np.ndarray]
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.array([len(ids) for ids in self.token_ids]))

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Any) -> "Texts":
        return cls([ids[:-1] for ids in encode(texts, tokenizer)])

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.token_ids[index]


def adapted_checkpoint(
    base_folder: Path, texts: Sequence[str], validation: Sequence[str], settings: PretrainingSettings, folder: Path, checkpoints: Path
) -> Path:
    """A checkpoint that went on from `base_folder` on `texts`, with the weights that filled in `validation` best.

    Args:
        folder: where it lies, or is made if it is not there whole.
        checkpoints: where the training loop keeps its state meanwhile.

    Returns:
        `folder`.
    """
    try:
        verify_folder(folder)
    except ArtifactError:
        tokenizer = load_tokenizer(base_folder)
        with quiet_transformers():
            model = T5ForConditionalGeneration.from_pretrained(base_folder, dtype=torch.float32)
        source, held_out = (PretrainingBatches(Texts.of(part, tokenizer), tokenizer, settings) for part in (texts, validation))
        evaluate = SpanCorruptionEvaluation(held_out, tokenizer, settings.validation_rows)
        train(model, source, settings, checkpoints, evaluate=evaluate)
        with atomic_folder(folder, {"base": base_digest(base_folder)}) as written, quiet_transformers():
            model.save_pretrained(written)
            tokenizer.save_pretrained(written)
            copy_sentencepiece(base_folder, written)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return folder
