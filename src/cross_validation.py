"""Folds of labelled rows, and models run over them one job at a time: what `src.compare` is made of.

A job is one model on one fold with one seed and one share of the labels. That of a fine-tuned model is written whole when it is done and
named by everything that shapes it but the code, so an interrupted comparison goes on where it stopped and a model added later costs only
its own jobs. The price is disk: a few hundred kilobytes of predictions a job, and a checkpoint for each fold of adapted models.
"""

import functools
import json
import multiprocessing
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from src.adaptation import adapted_checkpoint
from src.artifacts import code_digest
from src.baselines import BASELINES
from src.collators import TextsCutWarning
from src.config import METHODS, FinetuningSettings, LabelledSettings, PretrainingSettings
from src.finetuning import MODEL_NAMES, finetune, model_name
from src.finetuning_dataset import drop_conflicts_and_repeats, groups_of, loose_key, read_cleaned, text_ids
from src.progress import progress_bar
from src.qlora import base_digest
from src.splits import grouped_stratified_folds, grouped_stratified_split
from src.tokenizer import MODEL_FILE
from src.verified_folders import ArtifactError, atomic_folder, file_sha256, json_sha256, verify_folder

# Of a fold's labels, those that are held out. A temperature needs few, and TF-IDF, which needs none, trains on all; but so few choose no
# weights, so those of the last step are judged. A learning rate is chosen on more. All folds together fit one temperature, so a single
# large split has to hold out more than one fold of ten does.
VALIDATION_ROWS, VALIDATION, MOST_VALIDATION, RATE_VALIDATION = 60, 0.02, 0.3, 0.1
BASE_FILES = ("config.json", "tokenizer.json", MODEL_FILE)  # of a base, that also a model from random weights takes
ONLY_AT_THE_END = 10**9  # steps from one evaluation to the next
MOST_EPOCHS = 50  # that a share of the labels is read: fewer labels more often, or training would end before its warm-up does


@dataclass(frozen=True)
class Contestant:
    """A fine-tuned model of the comparison."""

    task: str
    method: str
    random_init: bool = False
    adapted: bool = False  # on a base that went on with span corruption on the fold's training texts


CONTESTANTS = {
    **{model_name(task, method): Contestant(task, method) for task in MODEL_NAMES for method in METHODS},
    **{model_name(task, "full", True): Contestant(task, "full", random_init=True) for task in MODEL_NAMES},
    **{f"{model_name(task, method)}_adapted": Contestant(task, method, adapted=True) for task in MODEL_NAMES for method in METHODS},
}


@dataclass(frozen=True)
class Split:
    """What one fold trains on and is judged on."""

    draw: int  # the seed that drew the folds
    fold: int  # numbered on from draw to draw
    rest: pd.DataFrame
    test: pd.DataFrame


@dataclass(frozen=True)
class Job:
    """One model on one fold, with one seed and one share of the training labels."""

    model: str
    fold: int
    seed: int
    fraction: float = 1.0
    learning_rate: float | None = None  # None: that of the settings
    judged: str = "test"  # or "validation": the fold's test rows stay unseen


@dataclass(frozen=True)
class Finished:
    """What a job left: predictions on the test rows and what they cost."""

    job: Job
    test: pd.DataFrame
    validation: pd.DataFrame | None
    generated: pd.DataFrame | None  # text-to-text: predictions of free generation on the test rows
    costs: Mapping[str, float]

    def frames(self) -> dict[str, pd.DataFrame]:
        """The predictions there are, by name."""
        frames = {"test": self.test, "validation": self.validation, "generated": self.generated}
        return {name: frame for name, frame in frames.items() if frame is not None}


def labelled_rows(path: str, settings: LabelledSettings, *, published: bool = False) -> pd.DataFrame:
    """Cleaned labelled rows with `text_id`, `text`, `label`, `group` (near duplicates share one) and `key` (the text compared loosely).

    Args:
        published: a published split is judged as it is: repeated and contradictory texts stay. Otherwise stage 2's rules hold:
            a repeated text counts once, boilerplate and texts with several labels are dropped.
    """
    only = {"max_documents": None} if published else {}
    texts = read_cleaned(replace(settings, path=path, validation_path=None, **only))
    if not published:
        drop_conflicts_and_repeats(texts, settings.boilerplate_count)
        texts.drop("exact duplicates", texts.frame.duplicated("key"))
    frame = texts.frame.assign(text_id=text_ids(texts.frame["key"]), key=texts.frame["key"].map(loose_key))
    return frame.assign(group=groups_of(frame["text"], settings))


def rows_digest(*parts: pd.DataFrame) -> str:
    """SHA-256 of which text with which label stands in which part, and which texts are near duplicates."""
    rows = [part[["text_id", "text", "label", "group"]].to_numpy().tolist() for part in parts]
    return json_sha256(rows)


def folds_of(rows: pd.DataFrame, folds: int, seed: int) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """(rest, test) of each grouped, stratified fold.

    Raises:
        SplitError: a class is missing or has fewer groups than there are folds.
    """
    fold_of = grouped_stratified_folds(rows["label"].to_numpy(), rows["group"].to_numpy(), folds, seed)
    for fold in range(folds):
        yield rows[fold_of != fold], rows[fold_of == fold]


def part_of(rows: pd.DataFrame, fraction: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A grouped, stratified part of the rows, and the rest."""
    if fraction >= 1:
        return rows, rows.iloc[:0]
    part = grouped_stratified_split(rows["label"].to_numpy(), rows["group"].to_numpy(), (fraction, 1 - fraction), seed)
    return rows[part == 0], rows[part == 1]


def held_out(labelled: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that a fold's model does not learn from, and those that it does."""
    return part_of(labelled, min(MOST_VALIDATION, max(VALIDATION_ROWS / len(labelled), share)), seed)


@dataclass(frozen=True)
class Runner:
    """Runs jobs and keeps what they leave in `folder`."""

    folder: Path
    base_folder: Path
    settings: Mapping[str, FinetuningSettings]  # by task
    adaptation: PretrainingSettings
    processes: int = 1  # that `run_ahead` may start
    first_fold: int = 0  # of the run

    def run_ahead(self, jobs: Sequence[tuple[Job, pd.DataFrame, pd.DataFrame]]) -> None:
        """Do those of the jobs `(job, rest, test)` that are not on disk side by side, each on its share of the cores.

        A single job gains less from a second core than a second job does. Adapted models stay one at a time: those that read
        the same texts share a base, which the first of them makes.
        """
        if self.processes == 1:
            return
        apart = [one for one in jobs if one[0].model in CONTESTANTS and not CONTESTANTS[one[0].model].adapted]
        missing = [one for one in apart if read_finished(one[0], self.target(one[0], self.identity(*one))) is None]
        processes = min(self.processes, len(missing))
        if processes < 2:
            return
        threads = max(1, torch.get_num_threads() // processes)
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        with ProcessPoolExecutor(processes, spawn, initializer=start_worker, initargs=(threads,)) as pool:
            results = as_they_come(pool, processes, self.run, missing)
            for _ in progress_bar(results, total=len(missing), desc=f"models, {processes} at a time", unit="model"):
                pass

    def target(self, job: Job, identity: Mapping[str, Any]) -> Path:
        """The folder of a job's result."""
        return self.folder / f"{job.model}-{json_sha256(identity)[:16]}"

    def run(self, job: Job, rest: pd.DataFrame, test: pd.DataFrame) -> Finished:
        """The result of a job, from disk where it was done before; that of a baseline is made anew in seconds."""
        if job.model in BASELINES:
            labelled, _ = part_of(rest, job.fraction, job.fold)
            return Finished(job, BASELINES[job.model](labelled, test, job.fold), None, None, {})
        identity = self.identity(job, rest, test)
        target = self.target(job, identity)
        if (finished := read_finished(job, target)) is not None:
            return finished
        labelled, _ = part_of(rest, job.fraction, job.fold)
        checkpoints = self.folder / ".checkpoints" / target.name
        finished = self.judge(job, labelled, test, checkpoints)
        with atomic_folder(target, identity | {"code": code_digest()}) as folder:
            for name, frame in finished.frames().items():
                frame.to_parquet(folder / f"{name}.parquet")
            (folder / "costs.json").write_text(json.dumps(dict(finished.costs)))
        shutil.rmtree(checkpoints, ignore_errors=True)
        return finished

    def identity(self, job: Job, rest: pd.DataFrame, test: pd.DataFrame) -> dict[str, Any]:
        """Everything that shapes the result of a job, but the code."""
        contestant = CONTESTANTS[job.model]
        identity = {"job": asdict(job), "data": rows_digest(rest, test), "contestant": asdict(contestant)}
        identity |= {"settings": asdict(self.settings_of(job)), "base": self.taken_from_base(with_weights=not contestant.random_init)}
        return identity | ({"adaptation": asdict(self.adaptation)} if contestant.adapted else {})

    def taken_from_base(self, with_weights: bool = True) -> dict[str, str]:
        """Digests of the base's shape, tokenizer and weights; the control forgets the weights, so a base trained longer leaves it valid."""
        paths = [self.base_folder / name for name in BASE_FILES]
        taken = {path.name: file_sha256(path) for path in paths if path.is_file()}
        return taken | ({"weights": base_digest(self.base_folder)} if with_weights else {})

    def settings_of(self, job: Job) -> FinetuningSettings:
        contestant = CONTESTANTS[job.model]
        settings = replace(self.settings[contestant.task], seed=job.seed, evaluate_every=ONLY_AT_THE_END)
        settings = settings.for_random_start() if contestant.random_init else settings.with_method(contestant.method)
        if job.fraction < 1 and settings.max_epochs:
            epochs = min(settings.max_epochs / job.fraction, max(settings.max_epochs, MOST_EPOCHS))
            settings = replace(settings, max_epochs=epochs)
        return settings if job.learning_rate is None else settings.with_learning_rate(job.learning_rate)

    def judge(self, job: Job, labelled: pd.DataFrame, test: pd.DataFrame, checkpoints: Path) -> Finished:
        validation, train = held_out(labelled, RATE_VALIDATION if job.judged == "validation" else VALIDATION, job.fold)
        contestant, settings = CONTESTANTS[job.model], self.settings_of(job)
        if job.fraction < 1:  # the curve's scores need no temperature: train on all, as TF-IDF does; at 1 they are those of the table
            train = labelled
        splits = {"train": train, "validation": validation, "test": test if job.judged == "test" else validation}
        with warnings.catch_warnings():
            if job.fold != self.first_fold:  # the first has said how many
                warnings.simplefilter("ignore", TextsCutWarning)
            tuned = finetune(
                contestant.task,
                self.adapted_base(train, validation) if contestant.adapted else self.base_folder,
                splits,
                settings,
                checkpoints,
                random_init=contestant.random_init,
                name=job.model,
                fold=job.fold,
            )
        return Finished(job, tuned.test, tuned.validation.assign(fold=job.fold), tuned.generated, tuned.costs)

    def adapted_base(self, train: pd.DataFrame, validation: pd.DataFrame) -> Path:
        """The base after further span corruption on these training texts; models that see the same texts share it."""
        texts = [rows["text"].tolist() for rows in (train, validation)]
        shaped_by = {"base": self.taken_from_base(), "settings": asdict(self.adaptation), "texts": texts}
        name = f"adapted-{json_sha256(shaped_by)[:16]}"
        return adapted_checkpoint(self.base_folder, *texts, self.adaptation, self.folder / name, self.folder / ".checkpoints" / name)


def as_they_come(pool: Executor, processes: int, function: Callable[..., Finished], calls: Iterable[tuple[Any, ...]]) -> Iterator[Finished]:
    """Results of `function(*call)`. No more calls are handed over than run, so that after an interrupt none is still to be begun."""
    waiting, running = iter(calls), set()
    while running := running | {pool.submit(function, *call) for call in islice(waiting, processes - len(running))}:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def start_worker(threads: int) -> None:
    """A process of `Runner.run_ahead`: its share of the cores, and no bars that would overwrite those of the others."""
    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives


@functools.cache
def warn_of_other_code(folder: Path) -> None:
    """One line for all jobs of the folder, of which there may be hundreds."""
    warnings.warn(f"{folder} holds jobs of another version of the code: remove it to repeat them if that matters", stacklevel=3)


def read_finished(job: Job, folder: Path) -> Finished | None:
    """What an earlier run of the job left, or None; a damaged folder counts as none."""
    try:
        manifest = verify_folder(folder)
    except ArtifactError:
        return None
    if manifest["code"] != code_digest():
        warn_of_other_code(folder.parent)
    paths = (folder / f"{name}.parquet" for name in ("test", "validation", "generated"))
    frames = [pd.read_parquet(path) if path.exists() else None for path in paths]
    return Finished(job, *frames, json.loads((folder / "costs.json").read_text()))
