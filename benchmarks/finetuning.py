"""Sentences per second of fine-tuning, packed against three ways of padding: `python -m benchmarks.finetuning [--labelled PATH]`.

All four train the same classifier on the same sentences with the same optimizer and the memory allocator of our training loop, about
as many sentences to a step: `packed` fills rows with best-fit packing and segment ids; `pad512` pads every sentence to 512 tokens;
`bucketed` groups sentences by length and pads each to the end of its bucket (8, 16, 32, 64, ... tokens). `sorted`, padding each batch of
sentences sorted by length to its longest, is the best that padding can do and needs the whole epoch in order of length. They take
turns; the median of the rounds counts. The last line is one JSON object: ratios of packed sentences/s to the others', and the share of
packed positions that are real.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config

from benchmarks.device import DEVICE, synchronize
from src.collators import encode
from src.config import FinetuningSettings
from src.environment import device_name, keep_freed_memory
from src.finetuned_checkpoints import load_base
from src.finetuning import prepare_model
from src.finetuning_batches import ClassificationBatches
from src.inference import to_device
from src.modeling_t5 import T5ForConditionalGeneration
from src.optimizers import build_optimizer
from src.precision import autocast, precision_dtype
from src.profiles import settings_for
from src.sources import read_labelled
from src.tokenizer import load_tokenizer, train_tokenizer

PADDED_LENGTH = 512
Batch = dict[str, torch.Tensor]


def padded(inputs: list[np.ndarray], labels: np.ndarray, length: int) -> Batch:
    """Sentences padded with 0 to `length`: input_ids and attention_mask (sentences, length), labels (sentences,)."""
    input_ids = np.zeros((len(inputs), length), np.int64)
    for row, ids in enumerate(inputs):
        input_ids[row, : len(ids)] = ids
    mask = input_ids != 0
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": torch.from_numpy(labels),
    }


def bucket_of(length: int) -> int:
    """The end of the bucket of a length: the next power of two, 8 at least."""
    return max(8, 1 << (int(length) - 1).bit_length())


def batches_of(way: str, inputs: list[np.ndarray], labels: np.ndarray, sentences: int) -> Iterator[Batch]:
    """The sentences in padded batches of about `sentences`."""
    order = np.arange(len(inputs))
    lengths = np.array([len(ids) for ids in inputs])
    groups = [order]
    if way == "bucketed":
        buckets = np.array([bucket_of(length) for length in lengths])
        groups = [order[buckets == bucket] for bucket in np.unique(buckets)]
    elif way == "sorted":
        groups = [np.argsort(lengths, kind="stable")]
    for group in groups:
        for start in range(0, len(group), sentences):
            chosen = group[start : start + sentences]
            longest = int(lengths[chosen].max())
            length = {"pad512": PADDED_LENGTH, "bucketed": bucket_of(longest), "sorted": longest}[way]
            yield padded([inputs[index] for index in chosen], labels[chosen], length)


def seconds_of(model: torch.nn.Module, settings: FinetuningSettings, batches: list[Batch]) -> float:
    """Wall seconds of one pass of training over the batches, an optimizer step each."""
    optimizer = build_optimizer(model, settings)
    synchronize()
    started = time.perf_counter()
    for batch in batches:
        with autocast(model, settings):
            loss = model(**to_device(batch, model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize()
    return time.perf_counter() - started


def build(arguments: argparse.Namespace, texts: list[str]) -> tuple[torch.nn.Module, object, FinetuningSettings]:
    """A classifier of the profile's widths, its tokenizer (trained on the texts unless a checkpoint is given) and its settings."""
    settings = settings_for(arguments.profile)
    chosen = settings.classification.with_method(arguments.method)
    length = arguments.row_length or chosen.inputs_length
    rows = max(1, chosen.rows_per_step * chosen.inputs_length // length)  # of any length, about as many tokens in a step
    chosen = replace(chosen, inputs_length=length, rows_per_step=rows, rows_per_micro_batch=rows)
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.base or Path(folder)
        if arguments.base is None:
            tokenizer = train_tokenizer(texts, base, arguments.vocab_size)
            widths = settings.section("model")
            T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **widths)).save_pretrained(base)
        tokenizer = load_tokenizer(base)
        model = prepare_model("classification", base, chosen) if arguments.method != "full" else load_base("classification", base, chosen)
    return model.to(DEVICE).train(), tokenizer, chosen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetuning", description=__doc__.partition("\n")[0])
    parser.add_argument("--labelled", default="sample", help="labelled sentences, as for the pipeline")
    parser.add_argument("--label-map")
    parser.add_argument("--profile", default="mini", help="whose widths the model has")
    parser.add_argument("--base", type=Path, help="a T5 checkpoint with tokenizer, in place of random weights and a tokenizer of the texts")
    parser.add_argument("--method", default="full", choices=("full", "lora", "qlora"))
    parser.add_argument("--row-length", type=int, help="tokens of a packed row, in place of the profile's")
    parser.add_argument("--vocab-size", type=int, default=2_000)
    parser.add_argument("--sentences", type=int, default=768, help="sentences of one round; padding to 512 gets a sixth of them")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    frame = read_labelled(arguments.labelled, label_map=arguments.label_map, max_documents=arguments.sentences)
    texts, labels = frame["text"].tolist(), frame["label"].to_numpy(np.int64)
    model, tokenizer, settings = build(arguments, texts)
    inputs = encode(texts, tokenizer, settings.inputs_length)
    source = ClassificationBatches(texts, labels, tokenizer, settings)
    epoch = source.epoch(0)
    rows_per_step = settings.rows_per_step
    per_step = round(len(texts) * rows_per_step / epoch.num_rows)
    part = len(texts) // 6
    batches = {
        "packed": [epoch.batch(start, min(start + rows_per_step, epoch.num_rows)) for start in range(0, epoch.num_rows, rows_per_step)],
        "pad512": list(batches_of("pad512", inputs[:part], labels[:part], per_step)),
        "bucketed": list(batches_of("bucketed", inputs, labels, per_step)),
        "sorted": list(batches_of("sorted", inputs, labels, per_step)),
    }
    speeds: dict[str, list[float]] = {way: [] for way in batches}
    for way in batches:
        seconds_of(model, settings, batches[way][:1])  # warm up
    for turn in range(arguments.rounds):
        for way in list(batches) if turn % 2 == 0 else list(batches)[::-1]:
            sentences = part if way == "pad512" else len(texts)
            speeds[way].append(sentences / seconds_of(model, settings, batches[way]))
            print(f"round {turn + 1}: {way:<9} {speeds[way][-1]:8.1f} sentences/s", flush=True)
    median = {way: statistics.median(values) for way, values in speeds.items()}
    print(f"{len(texts)} sentences, {sum(map(len, inputs)) / len(inputs):.1f} tokens each, about {per_step} in a step")
    ratios = {f"speed_ratio_{way}": round(median["packed"] / median[way], 3) for way in ("pad512", "bucketed", "sorted")}
    report = {**ratios, "real_token_fraction": round(epoch.packing.input_efficiency, 4), "sentences_per_s": round(median["packed"], 1)}
    report |= {"labelled": Path(arguments.labelled).name, "profile": arguments.profile, "method": arguments.method}
    report |= {"row_length": settings.inputs_length, "dtype": str(precision_dtype(settings)).removeprefix("torch.")}
    print(json.dumps(report | {"device": device_name(), "rounds": arguments.rounds}))


if __name__ == "__main__":
    main()
