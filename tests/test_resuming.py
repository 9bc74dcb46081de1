"""A run that is cut off goes on as if it never had been: killed anywhere, asked to stop, finished already, or not the same run."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src import pipeline
from src.interruption import INTERRUPTED, TrainingInterrupted
from src.precision import precision_of
from src.pretrain import pretrain
from src.pretraining import model_config, validation_source
from src.profiles import settings_for
from src.training import TrainingRun
from tests import tiny_run

RANDOM_KILLS = int(os.environ.get("RANDOM_KILLS", "20"))  # more of them: `RANDOM_KILLS=100 make test`


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
    """In a child: train quietly, dying at `fault`, a (place, call number) pair of `tiny_run.FAULTS`."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if dropped_randomness:
            from src import gradients

            gradients.step_seed = lambda seed, step, process: int.from_bytes(os.urandom(4), "little")
        if pause:
            tiny_run.slow_down(pause)
        if fault:
            tiny_run.die_at(*fault)
        result = tiny_run.run(folder)
        (Path(folder) / "result.json").write_text(json.dumps(tiny_run.digests(result)))


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
        ("between two steps", 1), ("between two steps", 9), ("between two steps", 11),
        ("between two micro-batches of a step", 18), ("in a step, before the weights change", 14),
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
        longest = 0.9  # seconds, and more each time: on a busy machine a run would never come to its first checkpoint
        while run_child(children, folder, kill_after=moments.uniform(0.1, longest), pause=0.02):
            kills, longest = kills + 1, longest + 0.1
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


def test_best_weights_that_are_lost_are_replaced_at_once(tmp_path):
    """Found missing when the run is over, they would stop every later run, hours too late and with no cure."""
    first = tiny_run.run(tmp_path)
    shutil.rmtree(first.folder / "best")
    with pytest.warns(UserWarning, match="best has no manifest.json: step 24 is evaluated anew"):
        again = tiny_run.run(tmp_path)
    assert again.best["step"] == 24
    assert tiny_run.run(tmp_path).best["step"] == 24


def test_a_run_that_stopped_early_stays_so_when_its_best_weights_are_lost(tmp_path):
    """Evaluated anew, it has its patience back: it would train on to the end of its budget."""
    options = {"early_stop_evaluations": 1, "learning_rate": 1e-9, "evaluate_every": 2, "evaluate": lambda model: {"validation_loss": 1.0}}
    first = tiny_run.run(tmp_path, **options)
    assert first.state.step == 4
    shutil.rmtree(first.folder / "best")
    with pytest.warns(UserWarning, match="step 4 is evaluated anew"):
        again = tiny_run.run(tmp_path, **options)
    assert again.state.step == again.best["step"] == 4
    assert tiny_run.run(tmp_path, **options).state.step == 4


def test_a_step_that_was_moved_aside_comes_back(tmp_path, capsys):
    """Killed between two renames, a run would begin at step 0 with a whole checkpoint beside it."""
    folder = tiny_run.run(tmp_path, checkpoint_every=1_000).folder
    (step,) = folder.glob("step-*")
    step.rename(folder / f".{step.name}.previous")
    tiny_run.run(tmp_path, checkpoint_every=1_000)
    assert "finished already at step 24" in capsys.readouterr().out
    assert not list(folder.glob(".*"))


def test_a_number_format_that_is_named_is_the_same_run(tmp_path):
    """Named after a disconnect, so that another device keeps to it, it would begin the run anew on the same one."""
    precision = precision_of(replace(tiny_run.SETTINGS, precision="auto"))
    assert tiny_run.run(tmp_path, max_steps=2, precision="auto").folder == tiny_run.run(tmp_path, max_steps=2, precision=precision).folder


def test_another_run_never_resumes_from_this_one(tmp_path, capsys):
    """Changed settings, data or starting weights make another run; mixing them up resumes into nonsense."""
    folders = {tiny_run.run(tmp_path, max_steps=2).folder, tiny_run.run(tmp_path, max_steps=2, learning_rate=0.01).folder}
    folders.add(tiny_run.run(tmp_path, model=changed_model(), max_steps=2).folder)
    folders.add(tiny_run.run(tmp_path, count=29, max_steps=2).folder)
    assert len(folders) == 4
    printed = capsys.readouterr().out
    assert "resumed" not in printed
    assert printed.count("a new run: run-") == 3  # hours that seem lost are told of
    assert tiny_run.run(tmp_path, max_steps=2, rows_per_micro_batch=4).folder in folders  # memory may leave no choice


def test_a_setting_of_the_model_makes_another_run(monkeypatch):
    """Dropout changes no weight: the finished run of another dropout would be taken for this one."""
    monkeypatch.setattr("src.pretrain.train", lambda *_, run_inputs, **__: run_inputs)
    read = []
    for changes in ({}, {"model.dropout_rate": 0.3}, {"model.relative_attention_max_distance": 64}):
        settings = settings_for("sample", changes)
        config = model_config(settings.model, tiny_run.FixedVocabulary())
        read.append(pretrain(settings, [], config, tiny_run.source(), evaluate=None, initialise=None, on_evaluation=None))
    assert len({json.dumps(one) for one in read}) == 3


def test_losses_are_on_the_same_rows_for_every_seed():
    """Which rows are read moves the loss by more than many a change that it is to judge."""
    batches = [
        validation_source(tiny_run.documents(), tiny_run.FixedVocabulary(), replace(tiny_run.SETTINGS, seed=seed)).epoch(0)[0]
        for seed in (0, 1)
    ]
    for key, values in batches[0].items():
        assert torch.equal(values, batches[1][key])


def test_first_weights_are_set_once(tmp_path):
    """Set again on a resumed run they would throw away what was learned; not set on a new one, the recipe is another."""
    calls = []

    def initialise(model):
        calls.append(1)
        tiny_run.halve(model)

    whole, evaluate = tiny_run.run(tmp_path / "whole", initialise=initialise, max_steps=12), tiny_run.evaluator()
    plain = tiny_run.run(tmp_path / "plain", max_steps=1)
    assert abs(whole.log[0]["loss"] - plain.log[0]["loss"]) > 1e-3

    def fail_late(model):
        if len(list((tmp_path / "cut").glob("run-*/step-*"))):
            raise KeyError("cut off")
        return evaluate(model)

    with pytest.raises(KeyError):
        tiny_run.run(tmp_path / "cut", evaluate=fail_late, initialise=initialise, max_steps=12)
    assert tiny_run.digests(tiny_run.run(tmp_path / "cut", initialise=initialise, max_steps=12)) == tiny_run.digests(whole)
    assert len(calls) == 2


def test_the_pipeline_is_asked_to_stop_as_a_notebook_is(monkeypatch, capsys):
    """A cluster's SIGTERM would end it at once, and the notebook that trains would be ended without having saved."""
    monkeypatch.setattr("sys.argv", ["pipeline", "run"])
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert pipeline.main() == INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "interrupted: what is finished is kept" in capsys.readouterr().err


def changed_model():
    model = tiny_run.model_with()
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1
    return model


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


def test_asked_to_stop_in_an_evaluation_it_takes_no_more_steps(tmp_path, uninterrupted):
    """An evaluation takes long already, and what starts a notebook waits for it only so long."""
    evaluate, calls = tiny_run.evaluator(), []

    def told(model):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model)

    with pytest.raises(SystemExit):
        tiny_run.run(tmp_path, evaluate=told)
    assert max(path.name for path in tmp_path.glob("run-*/step-*")) == "step-00000012"
    assert tiny_run.digests(tiny_run.run(tmp_path)) == uninterrupted
