"""A training run small enough to be killed and resumed many times; run as a script it is the victim.

`python -m tests.tiny_run FOLDER [key=value ...]` trains, resuming by itself; each process then writes `process-<number>.json` there: how
many there were, and how many folders it put in place. With `killed_after=STEPS` it dies when those are done, and
`{rank}` in FOLDER is the number of the process.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from src import checkpoints, training, verified_folders
from src.checkpoints import LOG, OPTIMIZER, WEIGHTS, Checkpoints
from src.config import ModelSettings, PretrainingSettings
from src.gradients import StepGradients
from src.pretraining import model_config, new_model
from src.pretraining_batches import PretrainingBatches
from src.tokenizer import TokenizedDocuments

ROOT = Path(__file__).parent.parent
SETTINGS = PretrainingSettings(
    max_steps=24, inputs_length=48, targets_length=16, warmup_steps=4, rows_per_step=4, rows_per_micro_batch=2,
    evaluate_every=6, checkpoint_every=5, precision="fp32", optimizer="adamw_rms_scaled", learning_rate=0.02,
)  # fmt: skip
MODEL = ModelSettings(d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=1, num_decoder_layers=1, dropout_rate=0.2)
CLOCKS = ("seconds", "tokens_per_second")  # the fields of a log record that no two runs share


class FixedVocabulary:
    """What training asks of a tokenizer, without one."""

    pad_token_id, eos_token_id, unk_token_id = 0, 1, 2

    def __len__(self):
        return 160

    def convert_tokens_to_ids(self, token):
        number = int(token.removeprefix("<extra_id_").removesuffix(">"))
        return 159 - number if number < 40 else self.unk_token_id


def documents(count=30, seed=0):
    """Sequences that rise by small steps: something to learn."""
    rng = np.random.default_rng(seed)
    texts = [(np.cumsum(rng.integers(1, 3, rng.integers(5, 80))) % 110 + 3).astype(np.uint16) for _ in range(count)]
    return TokenizedDocuments(np.concatenate(texts), np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(np.int64))


def source(settings=SETTINGS, count=30):
    return PretrainingBatches(documents(count), FixedVocabulary(), settings)


def evaluator(settings=SETTINGS):
    """Validation loss on a few rows."""
    batch = PretrainingBatches(documents(4, seed=1), FixedVocabulary(), settings).epoch(0)[0]
    return lambda model: {"validation_loss": model(**{key: values.to(model.device) for key, values in batch.items()}).loss.item()}


def model_with(**changes):
    """A new model, the same each time but for `changes` to `MODEL`."""
    return new_model(model_config(replace(MODEL, **changes), FixedVocabulary()), seed=0)


def halve(model):
    """First weights that are not those of the seed."""
    with torch.no_grad():
        model.shared.weight.mul_(0.5)


def run(folder, model=None, count=30, evaluate=None, initialise=None, dropout=MODEL.dropout_rate, halved=False, **changes):
    """Train `model` (None: a new one with `dropout`) on `count` documents; `changes` to settings. Returns the loop's result."""
    torch.set_num_threads(1)
    settings = replace(SETTINGS, **changes)
    model = model_with(dropout_rate=dropout) if model is None else model
    first = halve if halved else initialise
    evaluate = evaluate or evaluator(settings)
    return training.train(model, source(settings, count), settings, Path(folder), evaluate=evaluate, initialise=first)


def two_processes(module, *arguments):
    """Run a module in two processes on this CPU; returns what `subprocess.run` does."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(random.randint(20_000, 40_000))]
    return subprocess.run([*launch, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def without_clocks(log):
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in log]


def digests(result):
    """SHA-256 of weights, optimizer state and log of a finished run."""
    last = sorted(result.folder.glob("step-*"))[-1]
    out = {}
    for name in (WEIGHTS, OPTIMIZER):
        digest = hashlib.sha256()
        for key, tensor in sorted(load_file(last / name).items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        out[name] = digest.hexdigest()
    saved = [json.loads(line) for line in (last / LOG).read_text().splitlines()]
    out[LOG] = hashlib.sha256(json.dumps(without_clocks(saved)).encode()).hexdigest()
    best = load_file(result.folder / "best" / WEIGHTS)
    out["best"] = hashlib.sha256(b"".join(key.encode() + tensor.numpy().tobytes() for key, tensor in sorted(best.items()))).hexdigest()
    out["state"] = {key: value for key, value in asdict(result.state).items() if key not in CLOCKS}
    return out


def parse(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def main():
    folder, *pairs = sys.argv[1:]
    folder = folder.format(rank=os.environ.get("RANK", "0"))
    changes = {key: parse(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    if killed_after := changes.pop("killed_after", None):
        die_at("between two steps", killed_after + 1)
    written, publish = [], verified_folders.publish
    verified_folders.publish = lambda *arguments: written.append(arguments) or publish(*arguments)
    run(folder, **changes)
    accelerator = Accelerator()
    about = {"processes": accelerator.num_processes, "folders_written": len(written)}
    (Path(folder) / f"process-{accelerator.process_index}.json").write_text(json.dumps(about))


FAULTS = {
    "between two steps": (training.TrainingRun, "take_step"),
    "between two micro-batches of a step": (StepGradients, "_pass"),
    "in a step, before the weights change": (training.TrainingRun, "update_weights"),
    "while a checkpoint is written": (checkpoints, "save_tensors"),
    "before a checkpoint is put in place": (verified_folders, "publish"),
    "after the last checkpoint": (Checkpoints, "load_best"),
    "at an evaluation": (Checkpoints, "save_best"),
}


def die_at(place, call):
    """Kill this process at the n-th call of a function, as `kill -9` would."""
    owner, name = FAULTS[place]
    original, calls = getattr(owner, name), []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, dying)


def slow_down(seconds):
    """Spend most of the time in steps and in saving, so that random kills hit both."""
    step, save = training.TrainingRun.take_step, Checkpoints.save

    def slow_step(self, *arguments):
        time.sleep(seconds)
        return step(self, *arguments)

    def slow_save(self, *arguments):
        original = checkpoints.save_tensors

        def slow_tensors(tensors, path):
            original(tensors, path)
            time.sleep(seconds)

        checkpoints.save_tensors = slow_tensors
        try:
            save(self, *arguments)
        finally:
            checkpoints.save_tensors = original

    training.TrainingRun.take_step, Checkpoints.save = slow_step, slow_save


if __name__ == "__main__":
    main()
