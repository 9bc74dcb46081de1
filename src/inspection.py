"""What notebook 3 looks at closely: a masked text, a full row, ways of packing, spans and labels that the model writes, its caches."""

import copy
import itertools
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from src.collators import PackedEpoch
from src.config import FinetuningSettings, PretrainingSettings
from src.distant_supervision import DistantSupervisionError, LabelledSentences
from src.evaluation import predictions_frame
from src.inference import label_likelihoods
from src.modeling_t5 import T5ForConditionalGeneration
from src.precision import DTYPES, best_precision
from src.pretraining_batches import PretrainingBatches, sentinel_range
from src.span_corruption import corrupted_lengths, example_rng, noise_mask
from src.tokenizer import TokenizedDocuments


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


def compare_packing(documents: TokenizedDocuments, tokenizer: Any, settings: PretrainingSettings) -> dict[str, dict[str, float]]:
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


def sentences_without_list_words(documents: TokenizedDocuments, tokenizer: Any, tokens: int = 80_000) -> pd.DataFrame | None:
    """Sentences that the word list labels, about `tokens` long in all, without any of its words: as `SentencePairs.frame`.

    None, with a warning, where so few documents hold no sentence of some label.
    """
    try:
        pairs = LabelledSentences(documents, tokenizer).draw(tokens, np.random.default_rng(0))
    except DistantSupervisionError as error:
        warnings.warn(f"validation: {str(error).partition(':')[0]}, so the check of labels is left out", stacklevel=2)
        return None
    return replace(pairs, removed=np.ones_like(pairs.removed)).frame(tokenizer)


def judged_sentences(model: nn.Module, tokenizer: Any, rows: pd.DataFrame, settings: FinetuningSettings) -> pd.DataFrame:
    """Predictions of a model, fine-tuned on nothing, for `sentences_without_list_words`; the schema of `src.evaluation`.

    Args:
        rows: of documents that it was not trained on.
        settings: of text to text.
    """
    return predictions_frame(rows, label_likelihoods(model, tokenizer, rows["text"].tolist(), settings), "pre-trained")


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
