"""Fine-tuning as one flow: two tasks (classification head, text-to-text) by three methods (full, LoRA, QLoRA).

load the base -> freeze, quantise, adapt as the method says -> train -> predict -> predictions in the one schema. The notebooks
and the cross-validated comparison call the same functions, so a figure in one can be reached from the other.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config
from transformers.utils import logging as transformers_logging

from src import qlora
from src.collators import ClassificationBatches, TextToTextBatches
from src.config import FinetuningSettings
from src.evaluation import evaluate_predictions, predictions_frame
from src.inference import class_probabilities, generate_labels, label_ids_of, label_likelihoods, precision_dtype
from src.labels import LABELS
from src.modeling_t5 import T5ForConditionalGeneration, T5ForSentimentClassification
from src.tokenizer import load_tokenizer
from src.training import train

TASKS = ("classification", "text_to_text")
INFERENCE_FILE = "inference.json"  # what `src.predict` has to know of a saved model


class FinetuningError(ValueError):
    """A checkpoint or labelled rows that cannot be fine-tuned on."""


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
        """Scores of the test predictions, and of free generation where there is any; temperature from the validation rows."""
        return [evaluate_predictions(frame, self.validation) for frame in (self.test, self.generated) if frame is not None]


def load_base(task: str, folder: Path, settings: FinetuningSettings, random_init: bool = False) -> PreTrainedModel:
    """The model of a task from a T5 checkpoint, float32; the classification head is new and drawn from the seed.

    Args:
        random_init: keep the checkpoint's shape and forget its weights: the control that shows what pre-training is worth.
    """
    if not (folder / "config.json").is_file():
        raise FinetuningError(f"{folder} holds no config.json: it is not a checkpoint, run pretrain_t5_small.ipynb")
    config = T5Config.from_pretrained(folder)
    config.dropout_rate = config.classifier_dropout = settings.dropout_rate
    model_class = T5ForConditionalGeneration
    if task == "classification":
        model_class = T5ForSentimentClassification
        config.update({"num_labels": len(LABELS), "pooling": settings.pooling})
        config.id2label, config.label2id = dict(enumerate(LABELS)), {label: index for index, label in enumerate(LABELS)}
    torch.manual_seed(settings.seed)
    if random_init:
        return model_class(config)
    with quiet_loading():
        return model_class.from_pretrained(folder, config=config, dtype=torch.float32)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' report that the head is new, which it is meant to be, and its progress bar."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def prepare_model(task: str, folder: Path, settings: FinetuningSettings, random_init: bool = False) -> torch.nn.Module:
    """A model ready to be trained: all weights (full), or adapters and head on a frozen 16-bit (LoRA) or 4-bit (QLoRA) base."""
    model = load_base(task, folder, settings, random_init)
    if settings.method == "full":
        return model
    dtype = precision_dtype(settings)
    model = model.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    if settings.method == "qlora":
        qlora.quantise(model, dtype)
    return qlora.add_adapters(model, settings)


def batches(task: str, rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, settings: FinetuningSettings):
    """The packed batches that a task trains on."""
    absent = sorted(set(range(len(LABELS))) - set(rows["label"]))
    if absent:
        raise FinetuningError(f"the training rows hold no {LABELS[absent[0]]} text: every class needs at least one")
    source = ClassificationBatches if task == "classification" else TextToTextBatches
    return source(rows["text"].tolist(), rows["label"].tolist(), tokenizer, settings, truncate=True)


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
    of_labels = predictions[[f"p_{label}" for label in LABELS]].to_numpy()[np.arange(len(predictions)), predictions["label"]]
    loss = float(-np.log(np.clip(of_labels, 1e-12, None)).mean())
    return {"validation_loss": loss, "accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"]}


def finetune(
    task: str,
    base_folder: Path,
    splits: Mapping[str, pd.DataFrame],
    settings: FinetuningSettings,
    checkpoints: Path,
    *,
    name: str,
    random_init: bool = False,
    fold: int = 0,
) -> FineTuned:
    """Fine-tune on `splits["train"]`, choose weights on `splits["validation"]`, predict `splits["test"]` once.

    Args:
        task: "classification" or "text_to_text".
        base_folder: a Hugging Face T5 checkpoint with its tokenizer.
        splits: frames with `text_id`, `text`, `label`.
        checkpoints: where the training loop keeps its state; an interrupted run goes on from there.
        name: of the model, in predictions and tables.
        fold: written into the predictions.
    """
    settings = settings.with_method(settings.method)
    tokenizer = load_tokenizer(base_folder)
    model = prepare_model(task, base_folder, settings, random_init)
    table = qlora.parameter_table(model)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return validation_scores(predict_rows(task, model, tokenizer, splits["validation"], settings, name=name))

    run_inputs = {"task": task, "random_init": random_init, "base": qlora.base_digest(base_folder)}
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


def save_finetuned(tuned: FineTuned, folder: Path, base_folder: Path, settings: FinetuningSettings, temperature: float) -> None:
    """Write all that prediction needs: adapter and head (or full weights), tokenizer, `inference.json`."""
    if settings.method == "full":
        tuned.model.save_pretrained(folder)
    else:
        qlora.save_adapter(tuned.model, folder, base_folder)
    tuned.tokenizer.save_pretrained(folder)
    about = {"task": tuned.task, "method": settings.method, "temperature": temperature, "name": tuned.name}
    about |= {key: getattr(settings, key) for key in ("pooling", "inputs_length", "targets_length", "precision")}
    (folder / INFERENCE_FILE).write_text(json.dumps(about, indent=1))


def load_finetuned(folder: Path, base_folder: Path, settings: FinetuningSettings) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, dict]:
    """Load what `save_finetuned` wrote: model in eval mode, tokenizer, the content of `inference.json`.

    Args:
        base_folder: the checkpoint an adapter stands on; not read for full weights.

    Raises:
        FinetuningError: not a saved fine-tuned model, or labels other than ours.
        AdapterError: the base is another one, or the head is missing.
    """
    if not (folder / INFERENCE_FILE).is_file():
        raise FinetuningError(f"{folder / INFERENCE_FILE} is missing: it is not a fine-tuned model, run the fine-tuning notebook")
    about = json.loads((folder / INFERENCE_FILE).read_text(encoding="utf-8"))
    if about["method"] == "full":
        model = load_full(about["task"], folder)
    else:
        base = load_base(about["task"], base_folder, settings)
        dtype = precision_dtype(settings)
        base = base.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        model = qlora.load_adapter(base, folder, base_folder, dtype)
    return model.eval(), load_tokenizer(folder), about


def load_full(task: str, folder: Path) -> PreTrainedModel:
    """Full fine-tuned weights; a checkpoint without a head or with other labels is refused."""
    config = T5Config.from_pretrained(folder)
    if task == "classification" and [config.id2label[index] for index in sorted(config.id2label)] != list(LABELS):
        raise FinetuningError(f"{folder} knows the labels {', '.join(config.id2label.values())}, not {', '.join(LABELS)}")
    model_class = T5ForSentimentClassification if task == "classification" else T5ForConditionalGeneration
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise FinetuningError(f"{folder} lacks {sorted(report['missing_keys'])[0]}: a checkpoint without its head cannot classify")
    return model
