"""Default recipe against the T5 paper's, on the same tokens of the same clock: `python -m benchmarks.pretraining_recipe --minutes 20`.

The baseline is stock `transformers` T5 with the paper's Adafactor and schedule, reading windows of the concatenated stream
(it cannot take packed rows). Ours runs as the training loop runs it, compiled if the profile says so. Both take turns in slices of
half a minute, so noise of the machine hits both alike; evaluations do not count. Both are evaluated by the same model class on the
same packed validation rows. Reads the `tokenizer` and `pretraining_dataset` artifacts of a profile. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.device import DEVICE, synchronize
from src import profiles
from src.artifacts import open_artifact
from src.compilation import compile_blocks
from src.config import PretrainingSettings
from src.environment import keep_freed_memory
from src.inference import to_device
from src.modeling_t5 import T5ForConditionalGeneration
from src.optimizers import build_optimizer, learning_rate_factor
from src.precision import autocast, precision_dtype
from src.pretraining import (
    SpanCorruptionEvaluation,
    first_weights,
    model_config,
    new_model,
    training_source,
    validation_source,
)
from src.pretraining_batches import PretrainingBatches
from src.tokenizer import TokenizedDocuments, load_tokenizer

GOAL = 4.5  # nats per target token
SLICE_SECONDS = 30.0


@dataclass
class Contestant:
    """One recipe: model, optimizer, place in the data, and what it has spent."""

    name: str
    model: torch.nn.Module
    source: PretrainingBatches
    settings: PretrainingSettings
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    row: int = 0
    epoch_number: int = 0
    curve: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.model, self.settings)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.epoch = self.source.epoch(0)

    def take_slice(self, budget: float) -> None:
        """Train for one slice of the clock, or what is left of `budget` seconds."""
        end = min(self.seconds + SLICE_SECONDS, budget)
        while self.seconds < end:
            started = time.perf_counter()
            self.step(self.seconds / budget)
            synchronize()
            self.seconds += time.perf_counter() - started

    def step(self, progress: float) -> None:
        rows = min(self.settings.rows_per_step, self.epoch.num_rows)
        if self.row + rows > self.epoch.num_rows:
            self.epoch_number, self.row = self.epoch_number + 1, 0
            self.epoch = self.source.epoch(self.epoch_number)
        factor = learning_rate_factor(self.settings.schedule, self.steps, self.settings.warmup_steps, progress)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate if group.get("relative_step") else rate * factor
        self.model.train()
        labels = self.epoch.num_labels(self.row, self.row + rows)
        for start in range(self.row, self.row + rows, self.settings.rows_per_micro_batch):
            batch = self.epoch.batch(start, min(start + self.settings.rows_per_micro_batch, self.row + rows))
            self.tokens += sum(int((batch[key] > 0).sum()) for key in ("encoder_segment_ids", "decoder_segment_ids"))
            self.backward(to_device(batch, self.model), labels)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.row, self.steps = self.row + rows, self.steps + 1

    def backward(self, batch: dict[str, torch.Tensor], labels: int) -> None:
        with autocast(self.model, self.settings):
            if isinstance(self.model, transformers.T5ForConditionalGeneration):
                real = int((batch["labels"] != -100).sum())
                loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss * (real / labels)
            else:
                loss = self.model(**batch, num_items_in_batch=labels).loss
        loss.backward()


def evaluate(contestant: Contestant, evaluation: SpanCorruptionEvaluation) -> None:
    """Validation losses through one model class for all, so that packing and kernels are the same."""
    judge = T5ForConditionalGeneration(contestant.model.config).to(DEVICE)
    judge.load_state_dict(contestant.model.state_dict())
    with autocast(judge, contestant.settings):
        metrics = evaluation(judge.eval())
    point = {"minutes": contestant.seconds / 60, "steps": contestant.steps, "tokens": contestant.tokens, **metrics}
    contestant.curve.append(point)
    loss, bits = metrics["validation_loss"], metrics["validation_bits_per_word"]
    print(
        f"{contestant.name} {point['minutes']:6.2f} min {contestant.steps:6} steps {contestant.tokens:11,} tokens  "
        f"loss {loss:.3f}  {bits:.2f} bits per word",
        flush=True,
    )


@dataclass(frozen=True)
class Corpus:
    """What all contestants read."""

    tokenizer: Any
    tokenizer_folder: Path
    train: TokenizedDocuments
    validation: TokenizedDocuments

    @classmethod
    def of(cls, settings: profiles.Settings) -> "Corpus":
        tokenizer_folder = open_artifact(settings, "tokenizer").path
        folder = open_artifact(settings, "pretraining_dataset").path
        parts = (TokenizedDocuments.load(folder, split) for split in ("train", "validation"))
        return cls(load_tokenizer(tokenizer_folder), tokenizer_folder, *parts)


def paper_recipe(name: str, settings: profiles.Settings, corpus: Corpus) -> Contestant:
    """Stock T5 of the same size with the paper's optimizer and data, from T5's random weights."""
    recipe = replace(settings.pretraining, optimizer="adafactor_t5", packing="concatenate", labelled_share=0.0)
    ours = new_model(model_config(replace(settings.model, feed_forward_proj="relu"), corpus.tokenizer), recipe.seed)
    stock = transformers.T5ForConditionalGeneration(ours.config)
    stock.load_state_dict(ours.state_dict())
    return Contestant(name, stock.to(DEVICE), PretrainingBatches(corpus.train, corpus.tokenizer, recipe), recipe)


def own_recipe(name: str, settings: profiles.Settings, corpus: Corpus) -> Contestant:
    """Our T5 by these settings; the time that its first weights take counts."""
    recipe, config = settings.pretraining, model_config(settings.model, corpus.tokenizer)
    model = new_model(config, recipe.seed).to(DEVICE)
    if recipe.compile:
        compile_blocks(model)
    started = time.perf_counter()
    if initialise := first_weights(config, corpus.train, corpus.tokenizer_folder, recipe):
        initialise(model)
    spent = time.perf_counter() - started
    return Contestant(name, model, training_source(corpus.train, corpus.tokenizer, recipe), recipe, seconds=spent)


def take_turns(contestants: Sequence[Contestant], settings: profiles.Settings, corpus: Corpus, options: argparse.Namespace) -> None:
    """Train each for `options.minutes` of its own clock, in slices, and evaluate all on the same rows, by `settings`."""
    validation = validation_source(corpus.validation, corpus.tokenizer, settings.pretraining)
    evaluation = SpanCorruptionEvaluation(validation, corpus.tokenizer, options.validation_rows)
    budget = options.minutes * 60
    if late := [each.name for each in contestants if each.seconds >= budget]:
        raise SystemExit(f"error: finding first weights takes {', '.join(late)} longer than that: give more --minutes")
    while any(each.seconds < budget for each in contestants):
        for each in (each for each in contestants if each.seconds < budget):
            each.take_slice(budget)
            last = each.curve[-1]["minutes"] if each.curve else 0.0
            if each.seconds / 60 - last >= options.evaluate_every or each.seconds >= budget:
                evaluate(each, evaluation)


def minutes_to_goal(curve: list[dict]) -> float | None:
    return next((round(point["minutes"], 2) for point in curve if point["validation_loss"] < GOAL), None)


def parse_arguments(description: str, minutes: float) -> tuple[argparse.Namespace, profiles.Settings]:
    """The command line of a benchmark of recipes, put into effect, and the settings of the default recipe."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=minutes, help="for each recipe")
    profiles.add_settings_options(parser, "mini", "another setting of the default recipe")
    parser.add_argument("--evaluate-every", type=float, default=1.0, help="minutes of training between evaluations")
    parser.add_argument("--validation-rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    settings = profiles.settings_for(options.profile, profiles.parse_overrides(options.set))
    if precision_dtype(settings.pretraining) == torch.float16:
        raise SystemExit("error: float16 needs a gradient scaler, which is not here: use a device with bf16, or pretraining.precision=fp32")
    return options, settings


def main() -> None:
    options, settings = parse_arguments(__doc__, 20.0)
    corpus = Corpus.of(settings)
    both = [paper_recipe("baseline", settings, corpus), own_recipe("default", settings, corpus)]
    take_turns(both, settings, corpus, options)
    print(json.dumps(report(both, options)))


def report(both: list[Contestant], options: argparse.Namespace) -> dict:
    result: dict = {"minutes": options.minutes, "threads": options.threads, "profile": options.profile}
    for each in both:
        last = each.curve[-1]
        result |= {
            f"{each.name}_loss": round(last["validation_loss"], 4),
            f"{each.name}_loss_without_sentinels": round(last["validation_loss_without_sentinels"], 4),
            f"{each.name}_bits_per_word": round(last["validation_bits_per_word"], 4),
            f"{each.name}_tokens": each.tokens,
            f"{each.name}_steps": each.steps,
            f"{each.name}_minutes_to_4_5": minutes_to_goal(each.curve),
        }
    return result


if __name__ == "__main__":
    main()
