"""Fine-tuning as one flow: two tasks (classification head, text-to-text) by three methods (full, LoRA, QLoRA).

load the base -> freeze, quantise, adapt as the method says -> train -> predict -> predictions in the one schema. The notebooks
and the cross-validated comparison call the same functions, so a figure in one can be reached from the other.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from src.checkpoints import write_log
from src.config import FinetuningSettings
from src.evaluation import PROBABILITY_COLUMNS, evaluate_predictions, predictions_frame
from src.finetuned_checkpoints import FinetuningError, load_base, save_finetuned
from src.finetuning_batches import ClassificationBatches, TextToTextBatches
from src.inference import class_probabilities, generate_labels, label_ids_of, label_likelihoods
from src.labels import require_all_labels
from src.optimizers import STATE_BYTES
from src.precision import frozen_dtype, precision_dtype
from src.qlora import add_adapters, base_digest, parameter_table, quantise
from src.tokenizer import load_tokenizer
from src.training import train

MODEL_NAMES = {"classification": "pretrained_head", "text_to_text": "text_to_text"}  # by task


@dataclass
class FineTuned:
    """A trained model, its predictions, and what they cost."""

    name: str
    task: str
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    log: list[dict[str, Any]]
    validation: pd.DataFrame  # predictions
    test: pd.DataFrame
    generated: pd.DataFrame | None  # text-to-text: predictions of free generation on the test rows
    costs: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> list[dict[str, object]]:
        """Scores of the test predictions, and of free generation where there is any, with their costs; temperature from validation rows.

        What is written has no probabilities of its own, so no calibration either.
        """
        metrics = [evaluate_predictions(self.test, self.validation)]
        if self.generated is not None:
            written = evaluate_predictions(self.generated)
            metrics.append({key: written[key] for key in written if key not in ("ece", "reliability")})
        return [scores | {"costs": self.costs} for scores in metrics]


def model_name(task: str, method: str, random_init: bool = False) -> str:
    """Name of a model in predictions and tables, e.g. `pretrained_head_qlora`, `text_to_text`, `random_init`."""
    if random_init:
        return "random_init" if task == "classification" else "text_to_text_random_init"
    return MODEL_NAMES[task] + ("" if method == "full" else f"_{method}")


def prepare_model(task: str, folder: Path, settings: FinetuningSettings, random_init: bool = False) -> torch.nn.Module:
    """A model ready to be trained: all weights (full), or adapters and head on a frozen 16-bit (LoRA) or 4-bit (QLoRA) base."""
    model = load_base(task, folder, settings, random_init)
    if settings.method == "full":
        return model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, frozen_dtype(settings))
    if settings.method == "qlora":
        quantise(model, precision_dtype(settings))
    return add_adapters(model, settings)


def batches(task: str, rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, settings: FinetuningSettings):
    """The packed batches that a task trains on."""
    require_all_labels(rows["label"])
    source = ClassificationBatches if task == "classification" else TextToTextBatches
    return source(rows["text"].tolist(), rows["label"].tolist(), tokenizer, settings)


def predict_rows(
    task: str,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    settings: FinetuningSettings,
    *,
    name: str,
    fold: int = 0,
) -> pd.DataFrame:
    """Predictions (schema of `src.evaluation`) on labelled rows."""
    probabilities = class_probabilities if task == "classification" else label_likelihoods
    return predictions_frame(rows, probabilities(model, tokenizer, rows["text"].tolist(), settings), name, fold=fold)


def validation_scores(predictions: pd.DataFrame) -> dict[str, float]:
    """What the training loop watches: mean negative log-probability of the labels, accuracy, macro-F1."""
    scores = evaluate_predictions(predictions, resamples=1)
    of_labels = predictions[list(PROBABILITY_COLUMNS)].to_numpy()[np.arange(len(predictions)), predictions["label"]]
    loss = float(-np.log(np.clip(of_labels, 1e-12, None)).mean())
    return {"validation_loss": loss, "accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"]}


def finetune(
    task: str,
    base_folder: Path,
    splits: Mapping[str, pd.DataFrame],
    settings: FinetuningSettings,
    checkpoints: Path,
    *,
    random_init: bool = False,
    name: str | None = None,
    fold: int = 0,
) -> FineTuned:
    """Fine-tune on `splits["train"]`, choose weights on `splits["validation"]`, predict `splits["test"]` once.

    Args:
        task: "classification" or "text_to_text".
        base_folder: a Hugging Face T5 checkpoint with its tokenizer.
        splits: frames with `text_id`, `text`, `label`.
        checkpoints: where the training loop keeps its state; an interrupted run goes on from there.
        random_init: forget the base's weights: the control.
        name: of the model in its predictions; None: `model_name`.
        fold: written into the predictions.
    """
    settings, name = settings.with_method(settings.method), name or model_name(task, settings.method, random_init)
    tokenizer = load_tokenizer(base_folder)
    model = prepare_model(task, base_folder, settings, random_init)
    if len(tokenizer) > (rows := len(model.get_input_embeddings().weight)):
        raise FinetuningError(f"{base_folder}: its tokenizer knows {len(tokenizer)} tokens, its model {rows}: they are of two checkpoints")
    table = parameter_table(model, STATE_BYTES[settings.optimizer])

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return validation_scores(predict_rows(task, model, tokenizer, splits["validation"], settings, name=name))

    data = {key: hashlib.sha256(rows[["text", "label"]].to_csv(index=False).encode()).hexdigest() for key, rows in splits.items()}
    run_inputs = {"task": task, "random_init": random_init, "base": base_digest(base_folder), "data": data}
    result = train(
        model,
        batches(task, splits["train"], tokenizer, settings),
        settings,
        checkpoints,
        evaluate=evaluate,
        monitor="macro_f1",
        higher_is_better=True,
        run_inputs=run_inputs,
    )
    costs = {"parameters": table["parameters"].sum() / 1e6, "trainable": table["trainable"].sum() / 1e6}
    costs |= {"seconds": result.state.seconds, "mebibytes": float(table["mebibytes"].sum())}
    predictions = [predict_rows(task, model, tokenizer, splits[key], settings, name=name, fold=fold) for key in ("validation", "test")]
    generated = predict_by_generation(model, tokenizer, splits["test"], settings, predictions[1]) if task == "text_to_text" else None
    return FineTuned(name, task, model, tokenizer, result.log, *predictions, generated, costs)


def predict_by_generation(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: pd.DataFrame, settings: FinetuningSettings, likelihoods: pd.DataFrame
) -> pd.DataFrame:
    """Predictions by free generation; the probabilities beside them are those of the label likelihoods."""
    written = generate_labels(model, tokenizer, rows["text"].tolist(), settings)
    return likelihoods.assign(prediction=label_ids_of(written), model=likelihoods["model"] + "_generated")


def save_results(
    folder: Path,
    base_folder: Path,
    tuned: FineTuned,
    settings: FinetuningSettings,
    cleaning: str,
    predictions: pd.DataFrame,
    metrics: Sequence[Mapping[str, object]],
) -> None:
    """Write the model, `predictions.parquet`, `metrics.json` (its own first) and `training_log.jsonl`; `cleaning`: see `save_finetuned`."""
    save_finetuned(folder, base_folder, tuned.model, tuned.tokenizer, tuned.task, settings, metrics[0]["temperature"], cleaning)
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    (folder / "metrics.json").write_text(json.dumps(list(metrics), indent=1))
    write_log(folder, tuned.log)
