"""What stage 3 needs around the loop: a new model, the losses that are reported, and spans filled in by the model.

Three figures per evaluation, because one hides things: the loss over all target tokens (what is trained on), the loss
without sentinels (they are easy, so leaving them out gives a higher, more honest loss), and bits per hidden word, which alone compares
models with different tokenizers.
"""

import copy
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import T5Config
from transformers.modeling_outputs import BaseModelOutput

from src.collators import Documents, PackedEpoch, PretrainingBatches, sentinel_range
from src.config import FinetuningSettings, ModelSettings, PretrainingSettings
from src.distant_supervision import LabelledSentences
from src.evaluation import predictions_frame
from src.inference import label_likelihoods
from src.initialisation import CheckpointStart, InformedStart
from src.modeling_t5 import T5ForConditionalGeneration
from src.packing import IGNORED
from src.precision import DTYPES, best_precision
from src.span_corruption import corrupted_lengths, example_rng, noise_mask
from src.tokenizer import WORD_START, TokenizedDocuments, save_tokenizer
from src.training import TrainingResult


def new_model(settings: ModelSettings, tokenizer: Any, seed: int) -> T5ForConditionalGeneration:
    """A T5 with freshly drawn weights and the tokenizer's vocabulary and special ids."""
    config = T5Config(
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
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def first_weights(
    model: nn.Module, documents: TokenizedDocuments, tokenizer_folder: Path, settings: PretrainingSettings
) -> InformedStart | CheckpointStart | None:
    """What sets the weights of a new run in place of T5's random ones, if `settings.initialisation` wants that."""
    if settings.initialisation == "t5":
        return None
    if settings.initialisation == "informed":
        return InformedStart(documents, model.config, settings.seed)
    return CheckpointStart(Path(settings.initialisation).expanduser(), tokenizer_folder, model.config)


def training_source(documents: TokenizedDocuments, tokenizer: Any, settings: PretrainingSettings) -> PretrainingBatches:
    """What the model trains on: span corruption, and labelled sentences of the same documents where the settings give them a share."""
    sentences = LabelledSentences(documents, tokenizer) if settings.labelled_share else None
    return PretrainingBatches(documents, tokenizer, settings, sentences=sentences)


def judged_sentences(
    model: nn.Module, tokenizer: Any, documents: TokenizedDocuments, settings: FinetuningSettings, tokens: int = 20_000
) -> pd.DataFrame:
    """Predictions of a model, fine-tuned on nothing, for sentences that the word list labels; the schema of `src.evaluation`.

    Args:
        documents: to take sentences from, about `tokens` long in all: ones that it was not trained on.
        settings: of text to text.
    """
    rows = LabelledSentences(documents, tokenizer).draw(tokens, np.random.default_rng(settings.seed)).frame(tokenizer)
    return predictions_frame(rows, label_likelihoods(model, tokenizer, rows["text"].tolist(), settings), "pre-trained")


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


@torch.no_grad()
def fill_in_spans(model: nn.Module, tokenizer: Any, inputs: Sequence[np.ndarray], max_new_tokens: int, **generate: Any) -> list[np.ndarray]:
    """What the model writes for corrupted inputs, greedily; token ids up to and without eos, int64."""
    device = next(model.parameters()).device
    longest = max(map(len, inputs))
    input_ids = torch.full((len(inputs), longest), tokenizer.pad_token_id)
    for row, ids in enumerate(inputs):
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
    mask = (input_ids != tokenizer.pad_token_id).long()
    written = model.generate(
        input_ids=input_ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, do_sample=False, **generate
    )
    rows = written[:, 1:].cpu().numpy()  # without the decoder's start token
    return [row[: np.flatnonzero(np.append(row, tokenizer.eos_token_id) == tokenizer.eos_token_id)[0]] for row in rows]


def split_spans(ids: np.ndarray, first_sentinel_id: int, num_sentinels: int) -> dict[int, np.ndarray]:
    """Token ids that follow each sentinel of a target, by sentinel number; a later repetition does not count."""
    at = np.flatnonzero((ids <= first_sentinel_id) & (ids > first_sentinel_id - num_sentinels))
    spans: dict[int, np.ndarray] = {}
    for begin, end in itertools.pairwise([*at, len(ids)]):
        spans.setdefault(first_sentinel_id - int(ids[begin]), ids[begin + 1 : end])
    return spans


def example_of_length(source: PretrainingBatches, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, mask, inputs and targets of the window of epoch 0 whose length is nearest to `length`."""
    document, start, lengths = source.windows(0)
    window = int(np.abs(lengths - length).argmin())
    token_ids = source.documents[int(document[window])][start[window] : start[window] + lengths[window]]
    mask = noise_mask(len(token_ids), *source.noise, example_rng(source.settings.seed, 0, window))
    return token_ids, mask, *source.corrupted(0, window, token_ids)


def fullest_row(epoch: PackedEpoch) -> dict[str, torch.Tensor]:
    """The row with most examples, as a batch of one."""
    row = int(np.diff(epoch.packing.row_offsets).argmax())
    return epoch.batch(row, row + 1)


def compare_packing(documents: Documents, tokenizer: Any, settings: PretrainingSettings) -> dict[str, dict[str, float]]:
    """Rows and used positions of one epoch: one text a row, plain concatenation, best fit."""
    source = PretrainingBatches(documents, tokenizer, settings)
    inputs, targets = corrupted_lengths(source.windows(0)[2], *source.noise)
    used = (inputs.mean() / settings.inputs_length, targets.mean() / settings.targets_length)
    table = {"padding, one text a row": (len(inputs), *used)}
    for name, packing in (("concatenation, texts mixed", "concatenate"), ("best fit, texts kept apart", "best_fit")):
        plan = PretrainingBatches(documents, tokenizer, replace(settings, packing=packing, labelled_share=0.0)).epoch(0).packing
        table[name] = (len(plan), plan.input_efficiency, plan.target_efficiency)
    columns = ("rows", "encoder positions used", "decoder positions used")
    return {name: dict(zip(columns, values, strict=True)) for name, values in table.items()}


def written_spans(
    model: nn.Module, tokenizer: Any, source: PretrainingBatches, examples: int = 4, spans: int = 3, context: int = 8
) -> list[dict[str, str]]:
    """Hidden spans of some validation texts: the words before, the truth, and what the model writes there."""
    sentinels = sentinel_range(tokenizer)
    chosen = [example_of_length(source, length) for length in np.linspace(40, source.window, examples).astype(int)]
    written = fill_in_spans(model, tokenizer, [inputs for _, _, inputs, _ in chosen], source.settings.targets_length)
    rows = []
    for (_, _, inputs, targets), ids in zip(chosen, written, strict=True):
        truth, guesses = split_spans(targets[:-1], *sentinels), split_spans(ids, *sentinels)
        for number in np.linspace(0, len(truth) - 1, min(spans, len(truth))).astype(int).tolist():
            at = int(np.flatnonzero(inputs == sentinels[0] - number)[0])
            before = tokenizer.decode(inputs[max(0, at - context) : at])
            after = tokenizer.decode(inputs[at + 1 : -1][:context], skip_special_tokens=False)  # sentinels, but no eos
            guess = tokenizer.decode(guesses.get(number, np.zeros(0, int)))
            row = {"text before": before, "truth": tokenizer.decode(truth[number]), "written by the model": guess, "text after": after}
            rows.append({key: value.replace("<extra_id_", "⟨").replace(">", "⟩") for key, value in row.items()})
    return rows


@torch.no_grad()
def measure_decoding(
    model: T5ForConditionalGeneration, source: PretrainingBatches, batches: Sequence[int] = (1, 8, 32), new_tokens: int = 32
) -> pd.DataFrame:
    """Size and speed of the standard and the slim cache on this model, in float32 and in the format that is fast here.

    Returns:
        Columns `kind`, `batch`, `mebibytes`, `tokens_per_second` (from the encoder output on, the better of two runs).
    """
    input_ids = source.epoch(0).batch(0, 1)["input_ids"].to(model.device)
    rows = []
    for dtype in dict.fromkeys((torch.float32, DTYPES[best_precision()])):
        copied = copy.deepcopy(model).to(dtype).eval()
        states = copied.encoder(input_ids).last_hidden_state  # (1, source, d_model)
        for batch, kind in itertools.product(batches, ("kv", "x+e")):
            repeated = states.expand(batch, -1, -1).contiguous()
            seconds, size = min(decode_once(copied, kind, repeated, new_tokens) for _ in range(2))
            speed = {"mebibytes": size / 2**20, "tokens_per_second": batch * new_tokens / seconds}
            rows.append({"kind": f"{kind}, {str(dtype).removeprefix('torch.')}", "batch": batch, **speed})
    return pd.DataFrame(rows)


def decode_once(model: T5ForConditionalGeneration, kind: str, encoder_states: torch.Tensor, new_tokens: int) -> tuple[float, int]:
    """Seconds of `new_tokens` greedy steps, and bytes of the cache at the end; `encoder_states` (batch, source, d_model)."""
    outputs = BaseModelOutput(last_hidden_state=encoder_states)
    ids = torch.full((len(encoder_states), 1), model.config.decoder_start_token_id, device=model.device)
    started, cache = time.perf_counter(), model.new_cache(kind, new_tokens)
    for _ in range(new_tokens):
        logits = model(decoder_input_ids=ids, encoder_outputs=outputs, past_key_values=cache).logits
        ids = logits[:, -1:].argmax(-1)
    ids.tolist()  # waits for the device
    return time.perf_counter() - started, cache.num_bytes()


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
    (folder / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in result.log), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(dict(metrics), indent=1), encoding="utf-8")
