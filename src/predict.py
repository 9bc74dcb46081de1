"""Classify market news from Python or the shell: `python -m src.predict "Profit beat forecasts" --profile mini`.

Reads what the fine-tuning notebooks saved. All three probabilities are given, after temperature scaling on validation rows, so
0.8 is meant to be right about eight times in ten on texts like those it was trained on, and promises nothing on other texts.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from src.artifacts import open_artifact
from src.calibration import scale_temperature
from src.cleaning import clean_sentence
from src.config import FinetuningSettings
from src.evaluation import PROBABILITY_COLUMNS
from src.finetuned_checkpoints import as_saved, load_finetuned
from src.inference import class_probabilities, label_likelihoods
from src.labels import LABELS
from src.profiles import PROFILES, settings_for

ARTIFACTS = {"classification": "classification_head", "text_to_text": "text_to_text"}


class PredictionError(ValueError):
    """Texts that cannot be classified."""


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned model ready for texts: `Classifier.load("sample").classify(["Profit rose."])`."""

    task: str
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    settings: FinetuningSettings
    temperature: float
    cleaning: str  # preset of src.cleaning

    @classmethod
    def load(cls, profile: str = "sample", task: str = "classification") -> "Classifier":
        """Open a fine-tuned model and the base it stands on, both verified.

        Raises:
            ArtifactError: not there, damaged or stale; names the notebook to run.
            AdapterError: the adapter belongs to another base.
        """
        settings = settings_for(profile)
        tuned, base = open_artifact(settings, ARTIFACTS[task]), open_artifact(settings, "pretrained")
        return cls.from_folders(tuned.path, base.path, getattr(settings, task))

    @classmethod
    def from_folders(cls, folder: Path, base_folder: Path, settings: FinetuningSettings) -> "Classifier":
        """Load from a folder that `save_finetuned` wrote and the checkpoint that it was fine-tuned from."""
        model, tokenizer, about = load_finetuned(folder, base_folder, settings)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(about["task"], model.to(device), tokenizer, as_saved(settings, about), about["temperature"], about["cleaning"])

    def classify(self, texts: Sequence[str], batch_size: int = 1_000) -> pd.DataFrame:
        """One row a text: `text`, `prediction` (a label's name), `p_bearish`, `p_neutral`, `p_bullish`.

        Args:
            texts: any number, as they are: they are cleaned as the texts of training were. Longer ones than the model reads are
                cut into windows whose probabilities are averaged.
            batch_size: texts tokenised and packed at a time.

        Raises:
            PredictionError: no text, or one that is blank once it is cleaned.
        """
        if isinstance(texts, str) or not len(texts):
            raise PredictionError("there is no text to classify: give a list of texts")
        texts = list(texts)
        cleaned = [clean_sentence(text, self.cleaning) for text in texts]
        blank = next((number for number, text in enumerate(cleaned, 1) if not text.strip()), None)
        if blank is not None:
            raise PredictionError(f"text {blank} of {len(texts)} is blank, or was nothing but a link or a dateline: leave it out")
        function = class_probabilities if self.task == "classification" else label_likelihoods
        parts = [cleaned[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        probabilities = np.concatenate([function(self.model, self.tokenizer, part, self.settings) for part in parts])
        probabilities = scale_temperature(probabilities, self.temperature)
        frame = pd.DataFrame({"text": texts, "prediction": [LABELS[index] for index in probabilities.argmax(1)]})
        frame[list(PROBABILITY_COLUMNS)] = probabilities
        return frame


def read_texts(arguments: argparse.Namespace) -> list[str]:
    """Texts of the command line, of a file (one a line), or of standard input."""
    if arguments.texts and arguments.file:
        raise PredictionError(f"texts and --file {arguments.file} are both given: give one of them")
    if arguments.texts:
        return arguments.texts
    if arguments.file and not arguments.file.is_file():
        raise PredictionError(f"{arguments.file} is not a file: give a text file with one text a line")
    try:
        lines = (arguments.file.read_text(encoding="utf-8-sig") if arguments.file else sys.stdin.read()).split("\n")
    except UnicodeDecodeError as error:
        raise PredictionError(f"{arguments.file or 'standard input'} is not UTF-8 ({error.reason}): save it as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m src.predict", description=__doc__.partition("\n")[0])
    command.add_argument("texts", nargs="*", help="texts; without any, one a line from --file or standard input")
    command.add_argument("--file", type=Path, help="text file, one text a line")
    command.add_argument("--profile", default="sample", choices=sorted(PROFILES))
    command.add_argument("--task", default="classification", choices=sorted(ARTIFACTS))
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    return command


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. `None` reads the shell's own arguments."""
    arguments = parser().parse_args(command_line)
    logging.disable_progress_bar()
    try:
        texts = read_texts(arguments)
        found = Classifier.load(arguments.profile, arguments.task).classify(texts)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if arguments.json:
        print(found.round(4).to_json(orient="records", lines=True, force_ascii=False), end="")
        return 0
    for row in found.itertuples():
        probabilities = "  ".join(f"{label} {getattr(row, f'p_{label}'):.3f}" for label in LABELS)
        print(f"{row.prediction:<8} {probabilities}  {row.text[:80]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
