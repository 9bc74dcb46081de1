"""Further span corruption on the texts of a task before fine-tuning on their labels (task-adaptive pre-training, arXiv 2004.10964).

News articles and the sentences that people label are not quite one language. Some epochs of the pre-training task on the training
texts themselves, without their labels, bring a checkpoint closer. The price is a copy of the checkpoint for every set of texts.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.collators import encode
from src.config import PretrainingSettings
from src.finetuned_checkpoints import quiet_transformers
from src.modeling_t5 import T5ForConditionalGeneration
from src.pretraining import SpanCorruptionEvaluation, save_checkpoint
from src.pretraining_batches import PretrainingBatches
from src.qlora import base_digest
from src.tokenizer import TokenizedDocuments, load_tokenizer
from src.training import train
from src.verified_folders import ArtifactError, atomic_folder, verify_folder


def tokenized(texts: Sequence[str], tokenizer: Any) -> TokenizedDocuments:
    """Texts as the documents that `PretrainingBatches` reads."""
    token_ids = [ids[:-1] for ids in encode(texts, tokenizer)]  # without eos
    offsets = np.cumsum([0, *map(len, token_ids)])
    return TokenizedDocuments(np.concatenate(token_ids).astype(np.uint16), offsets)


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
    with suppress(ArtifactError):
        verify_folder(folder)
        return folder
    tokenizer = load_tokenizer(base_folder)
    with quiet_transformers():
        model = T5ForConditionalGeneration.from_pretrained(base_folder, dtype=torch.float32)
    source, held_out = (PretrainingBatches(tokenized(part, tokenizer), tokenizer, settings) for part in (texts, validation))
    evaluate = SpanCorruptionEvaluation(held_out, tokenizer, settings.validation_rows)
    train(model, source, settings, checkpoints, evaluate=evaluate)
    with atomic_folder(folder, {"base": base_digest(base_folder)}) as written, quiet_transformers():
        save_checkpoint(model, tokenizer, base_folder, written)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return folder
