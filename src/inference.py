"""What a fine-tuned model says about texts: probabilities of the three labels, or the words it generates.

Notebooks, the cross-validated comparison and `src.predict` all go through here. For probabilities, texts are packed as in training, and one
that is longer than a row is cut into windows whose probabilities are averaged, so nothing of it is lost. What is generated follows the
beginning of such a text, as far as a row holds it, and batches are padded.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from src.collators import Batch, encode
from src.config import FinetuningSettings
from src.evaluation import NO_LABEL
from src.finetuning_batches import ClassificationBatches, TextToTextBatches
from src.labels import LABEL_IDS, LABELS, TASK_PREFIX
from src.packing import IGNORED, fill_row
from src.precision import autocast


def windows(text: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """A text cut in halves until each part has at most `longest` tokens, eos counted; short texts stay whole.

    Cuts fall between words, and inside a word only where a single one is too long.
    """
    if len(encode([text], tokenizer)[0]) <= longest:
        return [text]
    words = text.split()
    if len(words) > 1:
        halves = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
    else:
        halves = text[: len(text) // 2], text[len(text) // 2 :]
    return [window for half in halves for window in windows(half, tokenizer, longest)]


def averaged_over_windows(
    probabilities: Callable[[list[str]], np.ndarray], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int
) -> np.ndarray:
    """Apply `probabilities` to windows and average them for each text: float64 (texts, 3)."""
    cut = [windows(text, tokenizer, longest) for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(parts) for parts in cut])
    found = probabilities([window for parts in cut for window in parts])  # (windows, 3)
    totals = np.zeros((len(texts), len(LABELS)))
    np.add.at(totals, owner, found)
    return totals / np.bincount(owner, minlength=len(texts))[:, None]


def to_device(batch: Batch, model: torch.nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {key: tensor.to(device) for key, tensor in batch.items()}


@torch.inference_mode()
def class_probabilities(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: FinetuningSettings
) -> np.ndarray:
    """Probabilities of a model with a classification head, float64 (texts, 3) in the order of `LABELS`."""

    def of_windows(parts: list[str]) -> np.ndarray:
        epoch = ClassificationBatches(parts, None, tokenizer, settings, shuffle=False).epoch(0)
        found = np.empty((len(parts), len(LABELS)))
        for index in range(len(epoch)):
            batch = to_device(epoch[index], model)
            real = batch.pop("labels") != IGNORED  # (rows, segments)
            with autocast(model, settings):
                logits = model(**batch).logits[:, : real.shape[1]]  # (rows, segments, 3)
            found[epoch.example_ids(index)] = logits[real[:, : logits.shape[1]]].float().softmax(-1).cpu()
        return found

    model.eval()
    return averaged_over_windows(of_windows, texts, tokenizer, settings.inputs_length)


@torch.inference_mode()
def label_likelihoods(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: FinetuningSettings
) -> np.ndarray:
    """Probabilities of a text-to-text model: how likely it is to write each label, given that it writes one of them.

    p(label) is the softmax over labels of log p(tokens of the label and eos | text). Each packed row is encoded once;
    the decoder reads that output three times in one batch, every segment followed by one of the labels.

    Returns:
        float64 (texts, 3) in the order of `LABELS`.
    """
    candidates = encode(LABELS, tokenizer)

    def of_windows(parts: list[str]) -> np.ndarray:
        epoch = TextToTextBatches(parts, None, tokenizer, settings, shuffle=False).epoch(0)
        found = np.empty((len(parts), len(LABELS)))
        for index in range(len(epoch)):
            batch = to_device(epoch[index], model)
            with autocast(model, settings):
                scores = score_candidates(model, batch["input_ids"], batch["encoder_segment_ids"], candidates)
            real = torch.arange(1, scores.shape[1] + 1, device=scores.device) <= batch["encoder_segment_ids"].amax(1, keepdim=True)
            found[epoch.example_ids(index)] = scores[real].softmax(-1).cpu()
        return found

    model.eval()
    prefix_length = len(tokenizer(TASK_PREFIX)["input_ids"])
    return averaged_over_windows(of_windows, texts, tokenizer, settings.inputs_length - prefix_length)


def score_candidates(
    model: torch.nn.Module, input_ids: torch.Tensor, encoder_segment_ids: torch.Tensor, candidates: Sequence[np.ndarray]
) -> torch.Tensor:
    """Log-likelihood of each candidate after each segment of packed rows: float32 (rows, most segments, candidates)."""
    rows, device = len(input_ids), input_ids.device
    counts = encoder_segment_ids.amax(1).tolist()
    length = max(counts) * max(len(candidate) for candidate in candidates)
    filled = [fill_row([(candidate[:0], candidate)] * count, 0, length, 0, 0) for candidate in candidates for count in counts]
    decoder = {key: torch.from_numpy(np.stack([row[key] for row in filled])).to(device) for key in filled[0]}  # (candidates x rows, length)
    encoded = encoder_of(model)(input_ids=input_ids, segment_ids=encoder_segment_ids)
    encoded.last_hidden_state = encoded.last_hidden_state.repeat(len(candidates), 1, 1)
    logits = model(
        encoder_outputs=encoded,
        encoder_segment_ids=encoder_segment_ids.repeat(len(candidates), 1),
        decoder_input_ids=decoder["decoder_input_ids"],
        decoder_segment_ids=decoder["decoder_segment_ids"],
    ).logits  # (candidates x rows, length, vocabulary)
    real = decoder["labels"] != IGNORED
    of_tokens = logits.float().log_softmax(-1).gather(-1, decoder["labels"].clamp(min=0)[..., None])[..., 0] * real
    of_segments = torch.zeros(len(filled), max(counts) + 1, device=device).scatter_add_(1, decoder["decoder_segment_ids"], of_tokens)
    return of_segments[:, 1:].reshape(len(candidates), rows, -1).permute(1, 2, 0)


def encoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The encoder of a model, adapters or not."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_encoder()


@torch.inference_mode()
def generate_labels(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: FinetuningSettings, batch_size: int = 64
) -> list[str]:
    """What a text-to-text model writes, greedily and freely: any text of at most a few tokens, one for each input."""
    model.eval()
    inputs = encode([TASK_PREFIX + text for text in texts], tokenizer, settings.inputs_length)
    order = np.argsort([len(ids) for ids in inputs], kind="stable")  # texts of like length together: little padding
    longest = max(len(ids) for ids in encode(LABELS, tokenizer)) + 2
    written = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [inputs[index].tolist() for index in chosen]}, return_tensors="pt")
        batch = to_device({key: batch[key] for key in ("input_ids", "attention_mask")}, model)
        with autocast(model, settings):
            output = model.generate(**batch, max_new_tokens=longest, do_sample=False, num_beams=1)
        for index, ids in zip(chosen, output[:, 1:].tolist(), strict=True):  # without the padding id that a T5 starts with
            ends = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            written[index] = tokenizer.decode(ids[:ends], skip_special_tokens=False).strip()  # a sentinel before a label is no label
    return written


def label_ids_of(written: Sequence[str]) -> np.ndarray:
    """Label ids of generated texts, int64; `NO_LABEL` for anything that is not exactly a label."""
    return np.array([LABEL_IDS.get(text, NO_LABEL) for text in written], dtype=np.int64)
