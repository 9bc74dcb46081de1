"""Fine-tuned models on disk: adapter and head (or full weights), tokenizer, and what prediction has to know, in one folder.

An adapter does not hold its base: small, but useless without the very checkpoint it was trained on, so the folder carries
that checkpoint's digest. `export_merged` makes one ordinary 16-bit model of both where that is wanted.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config
from transformers.utils import logging as transformers_logging

from src.config import FinetuningSettings
from src.labels import LABELS
from src.modeling_t5 import T5ForConditionalGeneration, T5ForSentimentClassification
from src.precision import frozen_dtype, precision_dtype
from src.qlora import load_adapter, merge_to_16_bit, save_adapter
from src.tokenizer import load_tokenizer

INFERENCE_FILE = "inference.json"  # what prediction has to know of a saved model
SAVED_SETTINGS = ("pooling", "inputs_length", "targets_length", "precision")


class FinetuningError(ValueError):
    """A checkpoint or labelled rows that cannot be fine-tuned on."""


def load_base(task: str, folder: Path, settings: FinetuningSettings, random_init: bool = False) -> PreTrainedModel:
    """The model of a task from a T5 checkpoint, float32; the classification head is new and drawn from the seed.

    Args:
        random_init: keep the checkpoint's shape and forget its weights: the control that shows what pre-training is worth.

    Raises:
        FinetuningError: not a checkpoint, one that lacks weights, or one that has a head, which has seen labels.
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
        if task == "text_to_text" and not getattr(config, "scale_decoder_outputs", True):
            raise FinetuningError(f"{folder} has an output layer of its own, which is not drawn anew: leave text_to_text_random_init out")
        return model_class(config)
    with quiet_transformers():
        model, report = model_class.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    of_head = {name for name in report["missing_keys"] if name.startswith("classification_head.")}
    if missing := sorted(report["missing_keys"] - of_head):
        raise FinetuningError(f"{folder} lacks {missing[0]}: name the folder of a whole T5 checkpoint")
    if task == "classification" and not of_head:
        raise FinetuningError(f"{folder} is fine-tuned, its head has seen labels: name the pre-trained checkpoint")
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, and its report that the head is new, which it is meant to be."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def save_finetuned(
    folder: Path,
    base_folder: Path,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    settings: FinetuningSettings,
    temperature: float,
    cleaning: str,
) -> None:
    """Write all that prediction needs: adapter and head (or full weights), tokenizer, `inference.json`.

    Args:
        temperature: that probabilities are scaled by.
        cleaning: preset of `src.cleaning` that the texts of training went through, and that others have to go through.
    """
    if settings.method == "full":
        model.save_pretrained(folder)
    else:
        save_adapter(model, folder, base_folder)
    tokenizer.save_pretrained(folder)
    about = {"task": task, "method": settings.method, "temperature": temperature, "cleaning": cleaning}
    about |= {key: getattr(settings, key) for key in SAVED_SETTINGS} | {"labels": list(LABELS)}
    # On a device that decides the precision otherwise, the base would round otherwise, and quantise to other levels.
    about["frozen_dtype"] = str(frozen_dtype(settings)).removeprefix("torch.")
    (folder / INFERENCE_FILE).write_text(json.dumps(about, indent=1))


def read_about(folder: Path) -> dict[str, Any]:
    """The content of `inference.json`: task, method, temperature, labels, and the settings that prediction needs."""
    if not (folder / INFERENCE_FILE).is_file():
        raise FinetuningError(f"{folder / INFERENCE_FILE} is missing: it is not a fine-tuned model, run the fine-tuning notebook")
    about = json.loads((folder / INFERENCE_FILE).read_text(encoding="utf-8"))
    require_our_labels(folder, about.get("labels", LABELS))
    return about


def require_our_labels(folder: Path, labels: Sequence[str]) -> None:
    """Refuse a model that means something else by its outputs, or means the same in another order."""
    if list(labels) != list(LABELS):
        raise FinetuningError(f"{folder} knows the labels {', '.join(labels)}, not {', '.join(LABELS)}: fine-tune again")


def as_saved(settings: FinetuningSettings, about: dict[str, Any]) -> FinetuningSettings:
    """The settings with those in the place of its own that a saved model was fine-tuned with and depends on."""
    return replace(settings, **{key: about[key] for key in SAVED_SETTINGS})


def base_as_trained(about: dict[str, Any], base_folder: Path, settings: FinetuningSettings) -> tuple[PreTrainedModel, torch.dtype]:
    """The base of a saved adapter, in the float type that was quantised or frozen in training, and the type to compute in."""
    settings = as_saved(settings, about)
    base = load_base(about["task"], base_folder, settings).to(getattr(torch, about["frozen_dtype"]))
    return base, precision_dtype(settings)


def load_finetuned(folder: Path, base_folder: Path, settings: FinetuningSettings) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, dict]:
    """Load what `save_finetuned` wrote: model in eval mode, tokenizer, the content of `inference.json`.

    Args:
        base_folder: the checkpoint an adapter stands on; not read for full weights.

    Raises:
        FinetuningError: not a saved fine-tuned model, or labels other than ours.
        AdapterError: the base is another one, or the head is missing.
    """
    about = read_about(folder)
    if about["method"] == "full":
        model = load_full(about["task"], folder)
    else:
        base, dtype = base_as_trained(about, base_folder, settings)
        model = load_adapter(base, folder, base_folder, dtype)
    return model.eval(), load_tokenizer(folder), about


def export_merged(folder: Path, base_folder: Path, settings: FinetuningSettings, target: Path) -> None:
    """Write a saved model as one ordinary 16-bit checkpoint without adapters, tokenizer beside it."""
    about = read_about(folder)
    if about["method"] == "full":
        model = load_full(about["task"], folder).to(torch.bfloat16)
    else:
        base, dtype = base_as_trained(about, base_folder, settings)
        model = merge_to_16_bit(base, folder, base_folder, compute_dtype=dtype)
    with quiet_transformers():
        model.save_pretrained(target)
    load_tokenizer(folder).save_pretrained(target)


def load_full(task: str, folder: Path) -> PreTrainedModel:
    """Full fine-tuned weights; a checkpoint without a head or with other labels is refused."""
    config = T5Config.from_pretrained(folder)
    if task == "classification":
        require_our_labels(folder, [config.id2label[index] for index in sorted(config.id2label)])
    model_class = T5ForSentimentClassification if task == "classification" else T5ForConditionalGeneration
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise FinetuningError(f"{folder} lacks {sorted(report['missing_keys'])[0]}: it is not whole or has no head, fine-tune again")
    return model
