"""Checkpoints that can be trusted: whole or absent, verified byte by byte before use, never another run's.

A run is named by what shapes it (settings, starting weights, digests of its data), so its folder can only hold its own checkpoints.
Each holds weights, optimizer, gradient scaler, position and log; nothing is pickled. Random numbers need no saving: each
step seeds them from its own number. Hashing costs reading every file once more, about a second per gigabyte.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from src.config import TrainingSettings
from src.verified_folders import ArtifactError, atomic_folder, canonical_json, recover, recover_all, remove_abandoned, verify_folder

logger = logging.getLogger(__name__)

KEPT = 2  # the newest and one to fall back to
WEIGHTS, OPTIMIZER, STATE, LOG = "weights.safetensors", "optimizer.safetensors", "state.json", "training_log.jsonl"
# Settings that may change while a run is interrupted. Fewer rows at a time draw dropout's masks otherwise; memory may leave no choice.
# Of the number format counts what it was decided to be, not whether it was named.
FREE_TO_CHANGE = ("rows_per_micro_batch", "checkpoint_every", "tracker", "precision")


class CheckpointError(ValueError):
    """No checkpoint can be used, or none can be written."""


@dataclass
class TrainingState:
    """Where a run stands. Everything that a step reads and that is not a tensor."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0
    step_in_epoch: int = 0
    tokens: int = 0  # real tokens read, encoder and decoder
    seconds: float = 0.0  # spent in this run up to its last step or evaluation, evaluations included
    evaluated_step: int = 0
    best: float | None = None  # of the monitored metric
    evaluations_without_best: int = 0
    steps_skipped: int = 0  # in a row, by the gradient scaler
    finished: bool = False


def run_digest(model: nn.Module, settings: TrainingSettings, source: Any, run_inputs: Mapping[str, Any]) -> str:
    """SHA-256 of what determines a run: settings, starting weights (adapters and frozen base), the first epoch's plan and first rows."""
    digest = hashlib.sha256()
    shaping = {key: value for key, value in asdict(settings).items() if key not in FREE_TO_CHANGE}
    digest.update(canonical_json({"settings": shaping, "inputs": dict(run_inputs)}))
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    epoch = source.epoch(0)
    digest.update(canonical_json({"rows": epoch.num_rows, "labels": epoch.num_labels(0, epoch.num_rows)}))
    for key, values in sorted(epoch.batch(0, 1).items()):
        digest.update(key.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def write_log(folder: Path, log: Iterable[Mapping[str, Any]]) -> None:
    """The log of a training run beside what it made, one JSON object a line."""
    (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in log), encoding="utf-8")


def trainable_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, by parameter name: shared weights once, frozen ones not at all."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into the model's trainable parameters."""
    saved, current = load_file(folder / WEIGHTS), trainable_tensors(model)
    if different := sorted(saved.keys() ^ current.keys()):
        raise CheckpointError(f"{folder} is of another model ({different[0]} is not in both): remove {folder.parent} to start anew")
    for name, parameter in current.items():
        parameter.copy_(saved[name])


def split_optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and as plain JSON values."""
    whole = optimizer.state_dict()
    tensors, values = {}, {}
    for index, entries in whole["state"].items():
        for key, entry in entries.items():
            # bitsandbytes hides its 8-bit state one level deeper from FSDP, and reads it from either place.
            for name, part in entry.items() if isinstance(entry, dict) else [(key, entry)]:
                (tensors if torch.is_tensor(part) else values)[f"{index}.{name}"] = part
    return tensors, {"values": values, "param_groups": whole["param_groups"]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
    """Undo `split_optimizer_state`."""
    state: dict[int, dict[str, Any]] = {}
    for name, entry in {**tensors, **plain["values"]}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = entry
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


class Checkpoints:
    """The checkpoints of one run, in `folder`: `step-00000200/`, ..., and `best/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []  # passed over when resuming: they stay to be looked at, and count as nothing to fall back to

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, state: TrainingState, log: list[dict]) -> None:
        """Write one checkpoint, then remove all but the newest `KEPT`.

        Raises:
            CheckpointError: not enough disk; earlier checkpoints stay. ArtifactError: it was filled by others while this was written.
        """
        weights, (tensors, plain) = trainable_tensors(model), split_optimizer_state(optimizer)
        remove_abandoned(self.folder, "step-*")  # a resumed run may never come to the step that a killed one was writing
        self._require_room(weights, tensors)
        with atomic_folder(self.folder / f"step-{state.step:08d}", {"step": state.step}) as folder:
            save_tensors(weights, folder / WEIGHTS)
            save_tensors(tensors, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps({"state": asdict(state), "optimizer": plain, "scaler": scaler.state_dict()}))
            write_log(folder, log)
        self.damaged = [folder for folder in self.damaged if folder.name != f"step-{state.step:08d}"]  # it is whole again
        for old in [kept for kept in self._all() if kept not in self.damaged][KEPT:]:
            shutil.rmtree(old)

    def other_runs(self) -> list[str]:
        """Names of other runs beside this one, of which a checkpoint is left."""
        return sorted({step.parent.name for step in self.folder.parent.glob("run-*/step-*") if step.parent != self.folder})

    def save_best(self, model: nn.Module, state: TrainingState, metrics: Mapping[str, float]) -> None:
        weights = trainable_tensors(model)
        self._require_room(weights)
        with atomic_folder(self.folder / "best", {"step": state.step, "metrics": dict(metrics)}) as folder:
            save_tensors(weights, folder / WEIGHTS)

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> tuple[TrainingState, list[dict]] | None:
        """Load the newest valid checkpoint into model, optimizer and scaler; a damaged one is named and passed over.

        Returns:
            State and log, or None where the run has no checkpoint yet.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
        """
        reasons = []
        for folder in self._all():
            try:
                verify_folder(folder)
            except (ArtifactError, OSError) as error:  # an OSError where a disk cannot read it back
                logger.warning("passing over a checkpoint: %s", error)
                reasons.append(str(error))
                self.damaged.append(folder)
                continue
            saved = json.loads((folder / STATE).read_text())
            load_weights(model, folder)
            load_optimizer_state(optimizer, load_file(folder / OPTIMIZER), saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            return TrainingState(**saved["state"]), [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        if reasons:
            raise CheckpointError(f"every checkpoint is damaged ({'; '.join(reasons)}): remove {self.folder} to start anew")
        return None

    def load_best(self, model: nn.Module) -> dict[str, Any]:
        """Load the best weights; returns `{"step", "metrics"}`.

        Raises:
            ArtifactError: missing or damaged; names the file.
        """
        recover(self.folder / "best")
        manifest = verify_folder(self.folder / "best")
        load_weights(model, self.folder / "best")
        return {"step": manifest["step"], "metrics": manifest["metrics"]}

    def best_is_lost(self) -> str | None:
        """What is wrong with the best weights, if anything is."""
        recover(self.folder / "best")
        try:
            verify_folder(self.folder / "best")
        except (ArtifactError, OSError) as error:
            return str(error)
        return None

    def _all(self) -> list[Path]:
        recover_all(self.folder, "step-*")
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _require_room(self, *tensor_groups: Mapping[str, torch.Tensor]) -> None:
        needed = sum(tensor.numel() * tensor.element_size() for tensors in tensor_groups for tensor in tensors.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"a checkpoint needs {needed:,} bytes and {self.folder} has {free:,} free: free {needed - free:,} bytes more, "
                "then run again; earlier checkpoints are kept"
            )


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
