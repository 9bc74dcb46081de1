"""What stage 3 needs around the loop: a new model, what it trains on, the losses that are reported, the checkpoint.

Three figures per evaluation, because one hides things: the loss over all target tokens (what is trained on), the loss
without sentinels (they are easy, so leaving them out gives a higher, more honest loss), and bits per hidden word, which alone compares
models with different tokenizers.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import T5Config

from src.checkpoints import write_log
from src.config import ModelSettings, PretrainingSettings
from src.distant_supervision import LabelledSentences
from src.initialisation import CheckpointStart, InformedStart
from src.modeling_t5 import T5ForConditionalGeneration
from src.packing import IGNORED
from src.pretraining_batches import PretrainingBatches, sentinel_range
from src.tokenizer import WORD_START, TokenizedDocuments, save_tokenizer
from src.training import TrainingResult


def model_config(settings: ModelSettings, tokenizer: Any) -> T5Config:
    """Of a T5 with the tokenizer's vocabulary and special ids."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=settings.d_model,
        d_kv=settings.d_kv,
        d_ff=settings.d_ff,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        num_decoder_layers=settings.num_decoder_layers,
        feed_forward_proj=settings.feed_forward_proj,
        relative_attention_num_buckets=settings.relative_attention_num_buckets,
        relative_attention_max_distance=settings.relative_attention_max_distance,
        dropout_rate=settings.dropout_rate,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def new_model(config: T5Config, seed: int) -> T5ForConditionalGeneration:
    """A T5 with freshly drawn weights."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def first_weights(
    config: T5Config, documents: TokenizedDocuments, tokenizer_folder: Path, settings: PretrainingSettings
) -> InformedStart | CheckpointStart | None:
    """What sets the weights of a new run in place of T5's random ones, if `settings.initialisation` wants that."""
    if settings.initialisation == "t5":
        return None
    if settings.initialisation == "informed":
        return InformedStart(documents, config, settings.seed)
    return CheckpointStart(Path(settings.initialisation).expanduser(), tokenizer_folder, config)


def training_source(documents: TokenizedDocuments, tokenizer: Any, settings: PretrainingSettings) -> PretrainingBatches:
    """What the model trains on: span corruption, and labelled sentences of the same documents where the settings give them a share."""
    sentences = LabelledSentences(documents, tokenizer) if settings.labelled_share else None
    return PretrainingBatches(documents, tokenizer, settings, sentences=sentences)


def validation_source(documents: TokenizedDocuments, tokenizer: Any, settings: PretrainingSettings) -> PretrainingBatches:
    """What the losses are reported on: the same rows and masks for every seed, or models of two seeds could not be compared."""
    return PretrainingBatches(documents, tokenizer, replace(settings, seed=0))


class SpanCorruptionEvaluation:
    """Losses of a model on the same corrupted validation rows every time; call it with the model.

    Args:
        source: of the validation documents; its epoch 0 is read.
        rows: packed rows to read at most.
    """

    def __init__(self, source: PretrainingBatches, tokenizer: Any, rows: int) -> None:
        self.epoch = source.epoch(0)
        self.rows = min(rows, self.epoch.num_rows)
        first_sentinel_id, num_sentinels = sentinel_range(tokenizer)
        ids = np.arange(len(tokenizer))
        special = (ids <= first_sentinel_id) & (ids > first_sentinel_id - num_sentinels)
        self.is_sentinel = torch.from_numpy(special)  # (vocab_size,)
        self.is_text = torch.from_numpy(~special & (ids != tokenizer.eos_token_id))
        pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
        self.starts_word = torch.tensor([piece.startswith(WORD_START) for piece in pieces])

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`validation_loss`, `validation_loss_without_sentinels` (nats per token), `validation_bits_per_word`."""
        nats, tokens = np.zeros(3), np.zeros(3)  # of all labels, of all but sentinels, of text (words in place of tokens)
        for start in range(0, self.rows, self.epoch.rows):
            batch = self.epoch.batch(start, min(start + self.epoch.rows, self.rows))
            losses, labels = token_losses(model, batch)
            chosen = [torch.ones_like(labels, dtype=torch.bool), ~self.is_sentinel[labels], self.is_text[labels]]
            nats += [float(losses[which].sum(dtype=torch.float64)) for which in chosen]
            tokens += [int(which.sum()) for which in chosen[:2]] + [int(self.starts_word[labels].sum())]
        loss, without_sentinels, per_word = nats / np.maximum(tokens, 1)
        return {
            "validation_loss": float(loss),
            "validation_loss_without_sentinels": float(without_sentinels),
            "validation_bits_per_word": float(per_word / math.log(2)),
        }


def token_losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each real label, float32 on CPU, and the labels: both (real labels,)."""
    device = next(model.parameters()).device
    inputs = {key: values.to(device) for key, values in batch.items() if key != "labels"}
    labels = batch["labels"]
    real = labels != IGNORED
    logits = model(**inputs).logits[real.to(device)].float()  # (real labels, vocab_size)
    labels = labels[real]
    losses = nn.functional.cross_entropy(logits, labels.to(device), reduction="none")
    return losses.cpu(), labels


def summary(result: TrainingResult, model: nn.Module) -> dict[str, float]:
    """The figures of a run that are kept with the checkpoint."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": result.state.step,
        "best_step": result.best["step"],
        "epochs": round(result.state.epoch + result.state.step_in_epoch / max(1, result.steps_in_epoch), 3),
        "tokens": result.state.tokens,
        "minutes": round(result.state.seconds / 60, 2),
        **{key: round(value, 4) for key, value in result.best["metrics"].items()},
    }


def save_checkpoint(model: nn.Module, tokenizer: Any, tokenizer_folder: Path, folder: Path) -> None:
    """Write a plain Hugging Face checkpoint and its tokenizer, the SentencePiece model of `tokenizer_folder` included."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, tokenizer_folder, folder)


def save_pretrained(
    model: nn.Module, tokenizer: Any, tokenizer_folder: Path, result: TrainingResult, metrics: Mapping[str, float], folder: Path
) -> None:
    """Write a plain Hugging Face checkpoint, with the log and figures of its making beside it."""
    save_checkpoint(model, tokenizer, tokenizer_folder, folder)
    write_log(folder, result.log)
    (folder / "metrics.json").write_text(json.dumps(dict(metrics), indent=1), encoding="utf-8")
