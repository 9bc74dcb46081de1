"""The training loop: the same result however often it is split up or starved, and an end where it is due."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.optimization import Adafactor

from src.gradients import StepGradients, step_seed
from src.interruption import TrainingInterrupted
from src.optimizers import learning_rate_factor, relative_rate
from src.training import TrainingError
from tests import tiny_run


def test_accumulation_keeps_the_global_batch(tmp_path):
    """Splitting a step must change its memory only: loss normalised per micro-batch would weight short rows more."""
    logs = []
    for rows in (1, 2, 4):
        run = tiny_run.run(tmp_path / str(rows), dropout=0, max_steps=6, rows_per_micro_batch=rows)
        logs.append([record[key] for record in run.log if "loss" in record for key in ("loss", "gradient_norm")])
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logs[0], logs[2], rtol=1e-4, atol=1e-5)


def test_out_of_memory_halves_the_micro_batch(tmp_path, capsys):
    """A run that meets one long batch must go on with the same losses, and say what it did."""
    runs = []
    for name in ("enough", "little"):
        model = tiny_run.model_with(dropout_rate=0)
        if name == "little":
            starve(model, most_rows=2)
        runs.append(tiny_run.run(tmp_path / name, model=model, max_steps=6, rows_per_micro_batch=4))
    losses = [[record["loss"] for record in run.log if "loss" in record] for run in runs]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert "going on with 2 rows at a time, the global batch stays 4" in capsys.readouterr().out


def starve(model, most_rows):
    forward = model.forward

    def hungry(input_ids, **batch):
        if input_ids.shape[0] > most_rows and model.training:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried")
        return forward(input_ids, **batch)

    model.forward = hungry


def test_no_memory_for_one_row_is_an_error(tmp_path):
    model = tiny_run.model_with()
    starve(model, most_rows=0)
    with pytest.raises(TrainingError, match=r"out of memory with 1 row\(s\) at a time: lower"):
        tiny_run.run(tmp_path, model=model, max_steps=3)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_at_once(tmp_path, what):
    """A NaN that is logged as a number and trained on destroys the weights and every later checkpoint."""
    model = tiny_run.model_with()
    forward, calls = model.forward, []

    def spoilt(**batch):
        output = forward(**batch)
        calls.append(model.training)
        if sum(calls) == 15 and model.training:  # the first micro-batch of step 8
            output.loss = output.loss * float("nan") if what == "loss" else output.loss + (model.shared.weight[0, 0] * 1e38) ** 2 * 0
            if what == "gradient":
                model.shared.weight.register_hook(lambda gradient: gradient * float("inf"))
        return output

    model.forward = spoilt
    with pytest.raises(TrainingError, match=r"step 8: loss .*; the last good checkpoint is kept"):
        tiny_run.run(tmp_path, model=model)
    (folder,) = tmp_path.glob("run-*")
    report = json.loads((folder / "non_finite.json").read_text())
    assert report["step"] == 8
    epoch = tiny_run.source().epoch(report["epoch"])
    assert report["epoch"] == 0
    assert report["example_ids"] == epoch.rows_example_ids(epoch.num_rows * 7 // 8, epoch.num_rows)  # the last of eight steps
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000005"]
    weights = load_file(folder / "step-00000005" / "weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_metric_that_is_never_finite_is_named(tmp_path):
    """There are no best weights then: told as a missing file, and on every later run, it names no cause."""
    for _ in range(2):
        with pytest.raises(TrainingError, match="validation_loss was never finite"):
            tiny_run.run(tmp_path, evaluate=lambda model: {"validation_loss": math.nan}, max_steps=2)


def test_budgets_and_early_stop(tmp_path):
    """Each budget alone ends a run where it says, and no later."""
    assert tiny_run.run(tmp_path / "steps", max_steps=3).state.step == 3
    epochs = tiny_run.run(tmp_path / "epochs", max_steps=None, max_epochs=1.0)
    assert (epochs.state.epoch, epochs.state.step_in_epoch) == (1, 0)
    minutes = tiny_run.run(tmp_path / "minutes", max_steps=None, max_minutes=0.02)
    before_last = next(record for record in reversed(minutes.log) if record["step"] < minutes.state.step)
    assert before_last["seconds"] < 1.2 <= minutes.state.seconds
    patient = tiny_run.run(tmp_path / "patience", max_steps=400, learning_rate=1e-9, evaluate_every=2, early_stop_evaluations=3)
    assert patient.state.step < 40


def test_a_stop_during_the_last_evaluation_is_heeded(tmp_path):
    """Swallowed, "run all" goes on to the next cell, and a comparison to its next job; the run itself is whole."""

    def evaluate(model):
        if len(scores) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {"validation_loss": scores.pop()}

    scores = [1.0, 2.0]
    with pytest.raises(TrainingInterrupted, match="finished at step 6"):
        tiny_run.run(tmp_path, evaluate=evaluate, max_steps=6, evaluate_every=3)
    assert tiny_run.run(tmp_path, evaluate=None, max_steps=6, evaluate_every=3).best["step"] == 6


def test_a_launcher_does_not_choose_the_number_format(tmp_path):
    """`accelerate launch --mixed_precision fp16` would scale gradients a second time, and a run in float32 would not be one."""
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.tiny_run", str(tmp_path / "launched"), "max_steps=3"]
    subprocess.run(command, cwd=tiny_run.ROOT, env=environment, check=True, capture_output=True)
    (folder,) = (tmp_path / "launched").glob("run-*")
    log = [json.loads(line) for line in (folder / "step-00000003" / "training_log.jsonl").read_text().splitlines()]
    assert tiny_run.without_clocks(log) == tiny_run.without_clocks(tiny_run.run(tmp_path / "plain", max_steps=3).log)


def test_best_weights_come_back(tmp_path):
    """The model handed on is the best one seen, not the last."""
    scores, seen = iter([3.0, 1.0, 2.0, 4.0]), []

    def evaluate(model):
        seen.append(model.shared.weight.detach().clone())
        return {"validation_loss": next(scores)}

    result = tiny_run.run(tmp_path, evaluate=evaluate, max_steps=12, evaluate_every=3)
    assert result.best == {"step": 6, "metrics": {"validation_loss": 1.0}}
    assert torch.equal(result.model.shared.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_two_processes_agree_with_one(tmp_path):
    """Data-parallel training must be the same training, killed and resumed: same first weights, batch and losses; one process writes."""
    options = ["max_steps=8", "dropout=0", "halved=true"]
    assert tiny_run.two_processes("tests.tiny_run", str(tmp_path / "two"), *options, "killed_after=7").returncode != 0
    finished = tiny_run.two_processes("tests.tiny_run", str(tmp_path / "two"), *options)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.count("resumed at step 5") == 2
    one = tiny_run.run(tmp_path / "one", dropout=0, halved=True, max_steps=8)
    (folder,) = (tmp_path / "two").glob("run-*")
    log = [json.loads(line) for line in (folder / "step-00000008" / "training_log.jsonl").read_text().splitlines()]
    for key in ("loss", "gradient_norm", "tokens"):
        theirs, ours = ([record[key] for record in records if "loss" in record] for records in (log, one.log))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    about = [json.loads((tmp_path / "two" / f"process-{number}.json").read_text()) for number in (0, 1)]
    assert [process["processes"] for process in about] == [2, 2]
    assert about[0]["folders_written"] > 0 == about[1]["folders_written"]
    (tmp_path / "two").rename(tmp_path / "two-0")  # as on two machines without a common disk
    apart = tiny_run.two_processes("tests.tiny_run", str(tmp_path / "two-{rank}"), *options)
    assert apart.returncode != 0
    assert "this process is at step 0 and another one is not: keep" in apart.stderr


def test_schedule_by_integers():
    """Warm-up off by one starts at rate 0 and wastes a step; a schedule past its budget must not turn negative."""
    assert [learning_rate_factor("constant", step, 4, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate_factor("linear", 10, 0, 0.25) == 0.75
    assert learning_rate_factor("linear", 10, 0, 1.5) == 0.0
    assert learning_rate_factor("inverse_sqrt", 400, 100, 0.0) == 0.5
    assert learning_rate_factor("cosine", 10, 0, 0.0) == 1.0
    assert learning_rate_factor("cosine", 10, 0, 1.0) == pytest.approx(0.02)
    group = {"relative_step": True, "warmup_init": False, "scale_parameter": False, "lr": None}
    for step in (0, 5_000, 39_999):
        assert relative_rate(step) == Adafactor._get_lr(group, {"step": step + 1})


def test_a_gradient_is_clipped_as_a_whole():
    """Not clipped, one bad batch throws a run off its course; and what is logged has to be the norm from before."""
    model = tiny_run.model_with()
    gradients = StepGradients(model, replace(tiny_run.SETTINGS, max_gradient_norm=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    entries = sum(parameter.numel() for parameter in model.parameters())
    assert gradients.clip().item() == pytest.approx(entries**0.5)
    assert torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_step_seeds_differ():
    """One seed for two steps or processes repeats dropout masks."""
    assert len({step_seed(seed, step, process) for seed in range(3) for step in range(20) for process in range(3)}) == 180


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_formats_learn(tmp_path, precision):
    """Each format has its own path through the loop (autocast, gradient scaler); weights stay float32 in both."""
    result = tiny_run.run(tmp_path, precision=precision)
    losses = [record["loss"] for record in result.log if "loss" in record]
    assert losses[-1] < losses[0] - 0.2
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())


def test_a_tracker_is_told_what_the_log_holds(tmp_path):
    """Breaks when a value, or the step that it belongs to, does not reach TensorBoard."""
    run = tiny_run.run(tmp_path, tracker="tensorboard", max_steps=6)
    events = EventAccumulator(str(run.folder)).Reload()
    for name in ("loss", "gradient_norm", "learning_rate", "validation_loss"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(record["step"], pytest.approx(record[name])) for record in run.log if name in record]


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(TrainingError, match="tracker no_such_tracker is not installed: pip install"):
        tiny_run.run(tmp_path, tracker="no_such_tracker")
