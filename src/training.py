"""The training loop of stages 3, 4 and 5, on `accelerate`: one process or many, one number format or another, never lost.

A step is a pure function of (weights, optimizer state, step number): batches come from a stateless source and random numbers are seeded
from the step's number. So a resumed run repeats the uninterrupted one bit for bit (float32 on CPU; not with a budget in minutes, for
then the learning rate follows the clock), and a step that ran out of memory can simply be taken again in smaller pieces. The price is
one synchronisation with the device per step.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast
from torch import nn

from src.checkpoints import CheckpointError, Checkpoints, TrainingState, run_digest
from src.collators import PackedEpoch
from src.compilation import compiled_blocks, uncompiled
from src.config import TrainingSettings
from src.environment import keep_freed_memory
from src.gradients import StepGradients, TrainingError
from src.interruption import StopRequest
from src.optimizers import build_optimizer, learning_rate_factor, relative_rate
from src.training_bar import TrainingBar

MOST_STEPS_SKIPPED = 20  # in a row, by the fp16 gradient scaler, before it counts as divergence


class Source(Protocol):
    """Plans epochs: `src.pretraining_batches` and `src.finetuning_batches` have them."""

    def epoch(self, epoch: int) -> PackedEpoch: ...


@dataclass
class TrainingResult:
    """What came out: the model with its best weights, the log, and where the best was seen."""

    model: nn.Module
    log: list[dict[str, Any]]
    best: dict[str, Any]  # {"step", "metrics"}
    folder: Path
    state: TrainingState = field(repr=False)
    steps_in_epoch: int = 0


def train(
    model: nn.Module,
    train_source: Source,
    settings: TrainingSettings,
    output_dir: Path,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]],
    monitor: str = "validation_loss",
    higher_is_better: bool = False,
    run_inputs: Mapping[str, Any] | None = None,
    initialise: Callable[[nn.Module], None] | None = None,
    on_evaluation: Callable[[list[dict[str, Any]]], None] | None = None,
) -> TrainingResult:
    """Train until the first budget is spent, resuming by itself where the same run was cut off.

    Args:
        model: takes a batch and `num_items_in_batch`, returns `.loss`; trained in place, ends with its best weights.
        output_dir: checkpoints go to a folder below it, named after the run.
        evaluate: called with the bare model in eval mode, without gradients; returns metrics, `monitor` among them.
        run_inputs: anything else that makes this run another one, e.g. digests of artifacts.
        initialise: called with the model before the first step of a new run, not when one is resumed; what it does must follow
            from `settings` and `run_inputs`.
        on_evaluation: called with the log after each evaluation, e.g. to redraw a curve.

    Raises:
        TrainingError: loss or gradient not finite, or no memory even for one row at a time.
        CheckpointError: no usable checkpoint, or no room for one.
        TrainingInterrupted: stopped from outside; everything is saved.
    """
    keep_freed_memory()
    run = TrainingRun(model, train_source, settings, output_dir, evaluate, monitor, higher_is_better, run_inputs or {})
    resumed = run.resume()
    if resumed and on_evaluation is not None and run.state.best is not None and run.accelerator.is_main_process:
        on_evaluation(run.log)
    elif not resumed and initialise is not None:
        run.initialise(initialise)
    with StopRequest() as stop, run.show_progress() as bar, compiled_blocks(model, settings.compile):
        run.evaluate_if_due(on_evaluation)
        while not run.is_over():
            stop_requested = run.take_step(stop)
            bar.show(run.log[-1], run.progress())
            if not stop_requested:
                run.save_if_due()  # before an evaluation, which takes long and can be made again
                stop_requested = run.evaluate_if_due(on_evaluation, stop) and not run.is_over()
            if stop_requested:
                run.save()
                stop.leave(f"stopped after step {run.state.step} and saved: run again to go on")
        result = run.finish(on_evaluation)
        if stop.requested:  # too late for a step to see it: what would come next shall not start
            stop.leave(f"finished at step {run.state.step} and saved")
    return result


class TrainingRun:
    """One run: its model, optimizer, place in the data, and log."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        settings: TrainingSettings,
        output_dir: Path,
        evaluate: Callable[[nn.Module], dict[str, float]],
        monitor: str,
        higher_is_better: bool,
        run_inputs: Mapping[str, Any],
    ) -> None:
        self.model, self.source, self.settings, self.evaluate = model, source, settings, evaluate
        self.monitor, self.sign = monitor, 1.0 if higher_is_better else -1.0
        self.gradients = StepGradients(model, settings, tracker_folder=str(output_dir))
        self.accelerator = self.gradients.accelerator
        digest = run_digest(model, settings, source, {**run_inputs, "precision": self.gradients.precision})
        self.checkpoints = Checkpoints(Path(output_dir) / f"run-{digest[:12]}")
        self.optimizer = build_optimizer(model, settings)
        self.initial_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.state, self.log = TrainingState(), []
        self.was_finished = False
        if settings.tracker:
            self.accelerator.init_trackers(self.checkpoints.folder.name)

    # --- where the run stands ---

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint, if there is one. Returns whether there was."""
        if (found := self.checkpoints.load_newest(self.model, self.optimizer, self.gradients.scaler)) is not None:
            self.state, self.log = found
            self.require_best()
            print(f"{'finished already' if self.state.finished else 'resumed'} at step {self.state.step}: {self.checkpoints.folder}")
        elif self.accelerator.is_main_process and (others := self.checkpoints.other_runs()):
            print(
                f"a new run: {', '.join(others)} in {self.checkpoints.folder.parent} had other settings or data, or"
                f" another number format than {self.gradients.precision}"
            )
        self.require_one_place()
        self.clock_start = time.monotonic() - self.state.seconds
        self.open_epoch()
        return found is not None

    def require_best(self) -> None:
        """Where the best weights are lost, those at hand are the best there are: judged anew at once, not found missing at the end."""
        if self.state.best is not None and (reason := self.checkpoints.best_is_lost()):
            warnings.warn(f"{reason}: step {self.state.step} is evaluated anew, and better weights from before are lost", stacklevel=2)
            self.was_finished = self.state.finished
            self.state.best, self.state.evaluated_step, self.state.finished = None, -1, False

    def require_one_place(self) -> None:
        """Raises CheckpointError unless all processes stand at one step: weights of two steps would be averaged in silence."""
        step, processes = self.state.step, self.accelerator.num_processes
        total, squares = self.gradients.sum_over_processes(float(step), float(step**2))
        if total**2 != processes * squares:
            raise CheckpointError(
                f"this process is at step {step} and another one is not: keep {self.checkpoints.folder} on a disk that all of them share"
            )

    def initialise(self, initialise: Callable[[nn.Module], None]) -> None:
        """First weights, of one process for all: two machines may round them differently. The clock runs meanwhile."""
        if self.accelerator.is_main_process:
            initialise(self.model)
        for parameter in self.model.parameters():
            broadcast(parameter.data)

    def open_epoch(self) -> None:
        self.epoch = self.source.epoch(self.state.epoch)
        self.steps_in_epoch = max(1, math.ceil(self.epoch.num_rows / self.settings.rows_per_step))

    def progress(self) -> float:
        """Share of the budget that is spent, 0..1: of the budget that ends first."""
        spent = (self.state.step, self.state.epoch + self.state.step_in_epoch / self.steps_in_epoch, self.state.seconds / 60)
        budgets = (self.settings.max_steps, self.settings.max_epochs, self.settings.max_minutes)
        return min(1.0, max(used / budget for used, budget in zip(spent, budgets, strict=True) if budget))

    def is_over(self) -> bool:
        patience = self.settings.early_stop_evaluations
        stopped_early = bool(patience and self.state.evaluations_without_best >= patience)
        return self.state.finished or self.was_finished or self.progress() >= 1 or stopped_early

    # --- one step ---

    def rows_of(self, step_in_epoch: int) -> tuple[int, int]:
        """First row of a step and of the next: an epoch's rows are shared out evenly, so no step is left with a few."""
        return tuple(self.epoch.num_rows * at // self.steps_in_epoch for at in (step_in_epoch, step_in_epoch + 1))

    def take_step(self, stop: StopRequest) -> bool:
        """One optimizer step on the next `rows_per_step` rows. Returns whether any process was asked to stop."""
        state, began = self.state, time.monotonic()
        rows = self.rows_of(state.step_in_epoch)
        self.set_learning_rate()
        loss, tokens = self.gradients.accumulate(self.epoch, *rows, state.step)
        self.gradients.scaler.unscale_(self.optimizer)
        norm = self.gradients.clip()
        if state.step_in_epoch + 1 < self.steps_in_epoch:
            self.gradients.prepare(self.epoch, *self.rows_of(state.step_in_epoch + 1))
        clock = time.monotonic() - self.clock_start if self.accelerator.is_main_process else 0.0
        loss, tokens, stops, state.seconds = self.gradients.sum_over_processes(loss.item(), tokens, float(stop.requested), clock)
        norm = norm.item()
        self.update_weights(loss, norm, rows)
        state.step, state.step_in_epoch, state.tokens = state.step + 1, state.step_in_epoch + 1, state.tokens + int(tokens)
        self.record(
            loss=loss,
            gradient_norm=norm,  # not finite in a step that the scaler skipped
            learning_rate=self.optimizer.param_groups[0]["lr"],
            tokens_per_second=tokens / (time.monotonic() - began),
        )
        if state.step_in_epoch == self.steps_in_epoch:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            self.open_epoch()
        return stops > 0

    def set_learning_rate(self) -> None:
        factor = learning_rate_factor(self.settings.schedule, self.state.step, self.settings.warmup_steps, self.progress())
        for group, rate in zip(self.optimizer.param_groups, self.initial_rates, strict=True):
            group["lr"] = relative_rate(self.state.step) if group.get("relative_step") else rate * factor

    def update_weights(self, loss: float, norm: float, rows: tuple[int, int]) -> None:
        """The optimizer's step, unless loss or gradient is not finite.

        Raises:
            TrainingError: not finite; the examples' ids are written beside the checkpoints.
        """
        scaler = self.gradients.scaler
        # A gradient that overflows fp16 is the scaler's daily business: it skips the step and scales less.
        skipped = scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        self.state.steps_skipped = self.state.steps_skipped + 1 if skipped else 0
        if not (math.isfinite(loss) and math.isfinite(norm)) and (not skipped or self.state.steps_skipped > MOST_STEPS_SKIPPED):
            self.report_non_finite(loss, norm, rows)
        scaler.step(self.optimizer)
        scaler.update()

    def record(self, **values: float | None) -> None:
        """Add a record to the log, and to the tracker if there is one. What is not finite becomes None: JSON knows no NaN."""
        state = self.state
        values = {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}
        self.log.append({"step": state.step, "epoch": state.epoch, "tokens": state.tokens, "seconds": state.seconds, **values})
        if self.settings.tracker:
            self.accelerator.log({key: value for key, value in values.items() if value is not None}, step=state.step)

    def report_non_finite(self, loss: float, norm: float, rows: tuple[int, int]) -> None:
        path = self.checkpoints.folder / "non_finite.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        where = {"step": self.state.step + 1, "epoch": self.state.epoch, "loss": str(loss), "gradient_norm": str(norm)}
        if self.accelerator.is_main_process:
            path.write_text(json.dumps(where | {"example_ids": self.epoch.rows_example_ids(*rows)}, indent=1))
        raise TrainingError(
            f"step {where['step']}: loss {loss}, gradient norm {norm}: lower learning_rate or raise warmup_steps, or look at "
            f"the examples in {path}; the last good checkpoint is kept"
        )

    # --- between steps ---

    def evaluate_if_due(
        self, on_evaluation: Callable[[list[dict]], None] | None, stop: StopRequest | None = None, force: bool = False
    ) -> bool:
        """Returns whether any process was asked to stop in the meantime."""
        state = self.state
        due = force or state.step % self.settings.evaluate_every == 0 or state.evaluated_step < 0
        if not due or state.evaluated_step == state.step:
            return False
        self.model.eval()
        with torch.no_grad(), self.gradients.autocast(), uncompiled():
            metrics = self.evaluate(self.model)
        state.evaluated_step = state.step
        # The first process decides for all: one that rounds differently must not stop alone.
        own = (metrics[self.monitor], time.monotonic() - self.clock_start) if self.accelerator.is_main_process else (0.0, 0.0)
        asked = float(stop is not None and stop.requested)
        value, state.seconds, stops = self.gradients.sum_over_processes(*own, asked)
        if math.isfinite(value) and (state.best is None or self.sign * (value - state.best) > 0):
            state.best, state.evaluations_without_best = value, 0
            if self.accelerator.is_main_process:
                self.checkpoints.save_best(self.model, state, metrics)
        else:
            state.evaluations_without_best += 1
        self.record(**metrics)
        if on_evaluation is not None and self.accelerator.is_main_process:
            on_evaluation(self.log)
        return stops > 0

    def save_if_due(self) -> None:
        if self.state.step % self.settings.checkpoint_every == 0 and not self.is_over():
            self.save()

    def save(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.model, self.optimizer, self.gradients.scaler, self.state, self.log)
        self.accelerator.wait_for_everyone()

    def finish(self, on_evaluation: Callable[[list[dict]], None] | None) -> TrainingResult:
        """Last evaluation and checkpoint, then the best weights."""
        if not self.state.finished:
            self.evaluate_if_due(on_evaluation, force=True)
            if self.state.best is None:
                raise TrainingError(f"{self.monitor} was never finite, so no weights are the best: look at the validation rows")
            self.state.finished = True
            self.save()
        if self.settings.tracker:
            self.accelerator.end_training()
        best = self.checkpoints.load_best(self.model)
        self.model.eval()
        return TrainingResult(self.model, self.log, best, self.checkpoints.folder, self.state, self.steps_in_epoch)

    def show_progress(self) -> TrainingBar:
        return TrainingBar(self.progress(), disable=not self.accelerator.is_main_process or self.state.finished)
