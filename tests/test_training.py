"""The training loop: the same result however often it is cut off, split up or starved."""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from src import checkpoints as checkpoints_module
from src import verified_folders
from src.gradients import step_seed
from src.interruption import TrainingInterrupted
from src.optimizers import learning_rate_factor
from src.training import TrainingError, TrainingRun, train
from tests import tiny_run

ROOT = Path(__file__).parent.parent
RANDOM_KILLS = int(os.environ.get("RANDOM_KILLS", "8"))  # `RANDOM_KILLS=20 make test` for the long version


@pytest.fixture(scope="module")
def children():
    """Processes that start at once: a server has imported everything and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny_run"])
    return context


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Digests of a run that nothing disturbed."""
    with redirect_stdout(io.StringIO()):
        return tiny_run.digests(tiny_run.run(tmp_path_factory.mktemp("uninterrupted")))


def child_run(folder, pause=0.0, fault=None, dropped_randomness=False):
    """In a child: train quietly, dying at `fault`, a (place, call number) pair of `FAULTS`."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if dropped_randomness:
            from src import gradients

            gradients.step_seed = lambda seed, step, process: int.from_bytes(os.urandom(4), "little")
        if pause:
            tiny_run.slow_down(pause)
        if fault:
            die_at(*fault)
        result = tiny_run.run(folder)
        (Path(folder) / "result.json").write_text(json.dumps(tiny_run.digests(result)))


FAULTS = {
    "between two steps": (TrainingRun, "take_step"),
    "in a step, before the weights change": (TrainingRun, "update_weights"),
    "while a checkpoint is written": (checkpoints_module, "save_tensors"),
    "before a checkpoint is put in place": (verified_folders, "publish"),
    "after the last checkpoint": (checkpoints_module.Checkpoints, "load_best"),
    "at an evaluation": (checkpoints_module.Checkpoints, "save_best"),
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


def run_child(children, folder, kill_after=None, **options):
    """Run one child; returns whether it was killed."""
    child = children.Process(target=child_run, args=(str(folder),), kwargs=options)
    child.start()
    child.join(kill_after)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    return child.exitcode == -signal.SIGKILL


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    "fault",
    [
        ("between two steps", 1), ("between two steps", 9), ("between two steps", 11), ("in a step, before the weights change", 14),
        ("while a checkpoint is written", 1), ("while a checkpoint is written", 5), ("before a checkpoint is put in place", 4),
        ("at an evaluation", 2), ("after the last checkpoint", 1),
    ],
)  # fmt: skip
def test_killed_anywhere_and_resumed_is_bitwise_the_same(children, uninterrupted, tmp_path, fault):
    """Mid-epoch, at an epoch's end, while saving, after the end: resuming repeats the run bit for bit, weights, optimizer and log."""
    assert run_child(children, tmp_path, fault=fault)
    assert not run_child(children, tmp_path)
    assert result_of(tmp_path) == uninterrupted


def test_killed_at_random_moments_is_bitwise_the_same(children, uninterrupted, tmp_path):
    """No moment at all is unsafe: `RANDOM_KILLS` kills, in steps and in saves, over as many runs as it takes."""
    moments, kills, campaign = random.Random(0), 0, 0
    while kills < RANDOM_KILLS:
        folder = tmp_path / str(campaign)
        while run_child(children, folder, kill_after=moments.uniform(0.1, 0.9), pause=0.02):
            kills += 1
        assert result_of(folder) == uninterrupted
        campaign += 1


def test_randomness_that_is_not_restored_would_be_noticed(children, uninterrupted, tmp_path):
    """The control: the same comparison fails when dropout's random numbers do not come from the step's number."""
    assert not run_child(children, tmp_path, dropped_randomness=True)
    assert result_of(tmp_path)["weights.safetensors"] != uninterrupted["weights.safetensors"]


def test_a_finished_run_does_nothing(tmp_path, capsys):
    """One step too many after the end changes a finished model in silence."""
    first = tiny_run.run(tmp_path)
    before = tiny_run.digests(first)
    again = tiny_run.run(tmp_path)
    assert "finished already at step 24" in capsys.readouterr().out
    assert tiny_run.digests(again) == before
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_run_never_resumes_from_this_one(tmp_path, capsys):
    """Changed settings, data or starting weights make another run; mixing them up resumes into nonsense."""
    folders = {tiny_run.run(tmp_path, max_steps=2).folder, tiny_run.run(tmp_path, max_steps=2, learning_rate=0.01).folder}
    folders.add(train(changed_model(), tiny_run.source(settings(2)), settings(2), tmp_path, evaluate=tiny_run.evaluator()).folder)
    folders.add(train(new_model(), tiny_run.source(settings(2), count=29), settings(2), tmp_path, evaluate=tiny_run.evaluator()).folder)
    assert len(folders) == 4
    assert "resumed" not in capsys.readouterr().out
    assert tiny_run.run(tmp_path, max_steps=2, rows_per_micro_batch=4).folder in folders  # this one changes no result


def test_first_weights_are_set_once(tmp_path):
    """Set again on a resumed run they would throw away what was learned; not set on a new one, the recipe is another."""
    calls = []

    def initialise(model):
        calls.append(1)
        tiny_run.halve(model)

    def run(folder, evaluate):
        return train(new_model(), tiny_run.source(settings(12)), settings(12), folder, evaluate=evaluate, initialise=initialise)

    whole, evaluate = run(tmp_path / "whole", tiny_run.evaluator()), tiny_run.evaluator()
    plain = train(new_model(), tiny_run.source(settings(1)), settings(1), tmp_path / "plain", evaluate=evaluate)
    assert abs(whole.log[0]["loss"] - plain.log[0]["loss"]) > 1e-3

    def fail_late(model):
        if len(list((tmp_path / "cut").glob("run-*/step-*"))):
            raise KeyError("cut off")
        return evaluate(model)

    with pytest.raises(KeyError):
        run(tmp_path / "cut", fail_late)
    assert tiny_run.digests(run(tmp_path / "cut", evaluate)) == tiny_run.digests(whole)
    assert len(calls) == 2


def settings(steps, **changes):
    return tiny_run.replace(tiny_run.SETTINGS, max_steps=steps, **changes)


def new_model():
    return tiny_run.new_model(tiny_run.MODEL, tiny_run.FixedVocabulary(), seed=0)


def changed_model():
    model = new_model()
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1
    return model


def test_accumulation_keeps_the_global_batch(tmp_path):
    """Splitting a step must change its memory only: loss normalised per micro-batch would weight short rows more."""
    model = tiny_run.replace(tiny_run.MODEL, dropout_rate=0.0)
    logs = []
    for rows in (1, 2, 4):
        values = settings(6, rows_per_micro_batch=rows)
        run = train(
            tiny_run.new_model(model, tiny_run.FixedVocabulary(), 0), tiny_run.source(values), values, tmp_path / str(rows),
            evaluate=tiny_run.evaluator(),
        )  # fmt: skip
        logs.append([record[key] for record in run.log if "loss" in record for key in ("loss", "gradient_norm")])
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logs[0], logs[2], rtol=1e-4, atol=1e-5)


def test_out_of_memory_halves_the_micro_batch(tmp_path, capsys):
    """A run that meets one long batch must go on with the same losses, and say what it did."""
    values = settings(6, rows_per_micro_batch=4)
    model = tiny_run.replace(tiny_run.MODEL, dropout_rate=0.0)
    runs = []
    for name in ("enough", "little"):
        tiny = tiny_run.new_model(model, tiny_run.FixedVocabulary(), 0)
        if name == "little":
            starve(tiny, most_rows=2)
        runs.append(train(tiny, tiny_run.source(values), values, tmp_path / name, evaluate=tiny_run.evaluator()))
    losses = [[record["loss"] for record in run.log if "loss" in record] for run in runs]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert "going on with 2 rows at a time, the global batch stays 4" in capsys.readouterr().out


def starve(model, most_rows):
    forward = model.forward

    def hungry(input_ids, **batch):
        if input_ids.shape[0] > most_rows and model.training:
            raise torch.OutOfMemoryError("not enough memory")
        return forward(input_ids, **batch)

    model.forward = hungry


def test_no_memory_for_one_row_is_an_error(tmp_path):
    model = new_model()
    starve(model, most_rows=0)
    with pytest.raises(TrainingError, match=r"out of memory with 1 row\(s\) at a time: lower"):
        train(model, tiny_run.source(settings(3)), settings(3), tmp_path, evaluate=tiny_run.evaluator())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_at_once(tmp_path, what):
    """A NaN that is logged as a number and trained on destroys the weights and every later checkpoint."""
    model = new_model()
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
        train(model, tiny_run.source(), tiny_run.SETTINGS, tmp_path, evaluate=tiny_run.evaluator())
    (folder,) = tmp_path.glob("run-*")
    report = json.loads((folder / "non_finite.json").read_text())
    assert report["step"] == 8
    epoch = tiny_run.source().epoch(report["epoch"])
    assert set(report["example_ids"]) <= set(epoch.rows_example_ids(0, epoch.num_rows))
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000005"]
    weights = checkpoints_module.load_file(folder / "step-00000005" / "weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, None)])
def test_asked_to_stop_saves_and_leaves(tmp_path, uninterrupted, monkeypatch, number, status):
    """Clusters send SIGTERM, people press stop: neither may cost more than the step at hand."""
    take_step, handler = TrainingRun.take_step, signal.getsignal(number)

    def interrupted(self, *arguments):
        if self.state.step == 7:
            os.kill(os.getpid(), number)
        return take_step(self, *arguments)

    monkeypatch.setattr(TrainingRun, "take_step", interrupted)
    with pytest.raises(SystemExit if status else TrainingInterrupted) as leaving:
        tiny_run.run(tmp_path)
    assert getattr(leaving.value, "code", None) == status
    monkeypatch.setattr(TrainingRun, "take_step", take_step)
    assert signal.getsignal(number) == handler
    (folder,) = tmp_path.glob("run-*")
    assert (folder / "step-00000008").exists()
    assert tiny_run.digests(tiny_run.run(tmp_path)) == uninterrupted


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


def test_best_weights_come_back(tmp_path):
    """The model handed on is the best one seen, not the last."""
    values = settings(12, evaluate_every=3)
    scores, seen = iter([3.0, 1.0, 2.0, 4.0]), []

    def evaluate(model):
        seen.append(model.shared.weight.detach().clone())
        return {"validation_loss": next(scores)}

    result = train(new_model(), tiny_run.source(values), values, tmp_path, evaluate=evaluate)
    assert result.best == {"step": 6, "metrics": {"validation_loss": 1.0}}
    assert torch.equal(result.model.shared.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_two_processes_agree_with_one(tmp_path):
    """Data-parallel training must be the same training: same first weights, global batch and losses; only one process writes."""
    options = ["max_steps=8", "dropout=0", "halved=true"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(random.randint(20_000, 40_000))]
    command = [*launch, "-m", "tests.tiny_run", str(tmp_path / "two"), *options]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    one = tiny_run.run(tmp_path / "one", dropout=0, halved=True, max_steps=8)
    (folder,) = (tmp_path / "two").glob("run-*")
    log = [json.loads(line) for line in (folder / "step-00000008" / "training_log.jsonl").read_text().splitlines()]
    for key in ("loss", "gradient_norm", "tokens"):
        theirs, ours = ([record[key] for record in records if "loss" in record] for records in (log, one.log))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "two" / "processes.json").read_text()) == 2


def test_schedule_by_integers():
    """Warm-up off by one starts at rate 0 and wastes a step; a schedule past its budget must not turn negative."""
    assert [learning_rate_factor("constant", step, 4, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate_factor("linear", 10, 0, 0.25) == 0.75
    assert learning_rate_factor("linear", 10, 0, 1.5) == 0.0
    assert learning_rate_factor("inverse_sqrt", 400, 100, 0.0) == 0.5
    assert learning_rate_factor("cosine", 10, 0, 0.0) == 1.0
    assert learning_rate_factor("cosine", 10, 0, 1.0) == pytest.approx(0.02)


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


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(TrainingError, match="tracker no_such_tracker is not installed: pip install"):
        tiny_run.run(tmp_path, tracker="no_such_tracker")
