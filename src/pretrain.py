"""Stage 3's training alone, for more than one GPU or machine: `accelerate launch --num_processes 4 -m src.pretrain --profile small`.

A notebook is one process. This trains the same run in as many as the launcher starts, and keeps it where the notebook looks: run that
afterwards with the same settings, and it finds the training done, shows what came of it and writes the artifact.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import T5Config

from src.artifacts import Artifact, open_artifact
from src.initialisation import CheckpointStart, InformedStart
from src.interruption import INTERRUPTED, TrainingInterrupted
from src.pretraining import SpanCorruptionEvaluation, first_weights, model_config, new_model, training_source, validation_source
from src.pretraining_batches import PretrainingBatches
from src.profiles import Settings, add_settings_options, artifacts_folder, parse_overrides, settings_for
from src.tokenizer import TokenizedDocuments, load_tokenizer
from src.training import TrainingResult, train


def pretrain(
    settings: Settings,
    inputs: Sequence[Artifact],
    config: T5Config,
    source: PretrainingBatches,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]],
    initialise: InformedStart | CheckpointStart | None,
    on_evaluation: Callable[[list[dict[str, Any]]], None],
) -> TrainingResult:
    """`src.training.train`, told what makes two runs of stage 3 one (model, settings, `inputs`, first weights) and where checkpoints lie.

    The model is made here, of `config`: one that has been trained in place would start another run.
    """
    read: dict[str, Any] = {artifact.name: artifact.digest for artifact in inputs}
    read |= {source["path"]: source["sha256"] for source in (initialise.sources if initialise else ())}
    read |= {"model": asdict(settings.model)}  # dropout changes no weight by which the loop could tell two models apart
    return train(
        new_model(config, settings.pretraining.seed),
        source,
        settings.pretraining,
        artifacts_folder(settings.profile) / ".checkpoints" / "pretrained",
        evaluate=evaluate,
        initialise=initialise,
        on_evaluation=on_evaluation,
        run_inputs=read,
    )


def run(settings: Settings) -> TrainingResult:
    """Train, or go on, in this process and those that the launcher started beside it."""
    inputs = [open_artifact(settings, name) for name in ("tokenizer", "pretraining_dataset")]
    tokenizer = load_tokenizer(inputs[0].path)
    documents = {split: TokenizedDocuments.load(inputs[1].path, split) for split in ("train", "validation")}
    train_source = training_source(documents["train"], tokenizer, settings.pretraining)
    config = model_config(settings.model, tokenizer)
    start = first_weights(config, documents["train"], inputs[0].path, settings.pretraining)
    held_out = validation_source(documents["validation"], tokenizer, settings.pretraining)
    evaluate = SpanCorruptionEvaluation(held_out, tokenizer, settings.pretraining.validation_rows)
    return pretrain(settings, inputs, config, train_source, evaluate=evaluate, initialise=start, on_evaluation=print_evaluation)


def print_evaluation(log: Sequence[Mapping[str, Any]]) -> None:
    last = next(record for record in reversed(log) if "validation_loss" in record)  # a checkpoint is older than its step's evaluation
    scores = {key.removeprefix("validation_"): value for key, value in last.items() if key.startswith("validation_")}
    shown = (f"{name} {'not finite' if value is None else f'{value:.3f}'}" for name, value in scores.items())
    print(f"\nstep {last['step']}: validation {', '.join(shown)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="src.pretrain", description=__doc__.partition("\n")[0])
    add_settings_options(parser, "small", "a setting of `model` or `pretraining`")
    arguments = parser.parse_args()
    try:
        result = run(settings_for(arguments.profile, parse_overrides(arguments.set)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except TrainingInterrupted:  # it has said so
        return INTERRUPTED
    if PartialState().is_main_process:
        print(f"trained to step {result.state.step}, best at {result.best['step']}: run pretrain_t5_small.ipynb to look at it and keep it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
