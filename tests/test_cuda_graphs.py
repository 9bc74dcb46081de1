"""Recording a training pass, as far as it shows without a GPU; tests/test_cuda.py has the rest."""

import contextlib

import pytest
import torch

from src import cuda_graphs, gradients
from src.modeling_t5 import T5ForConditionalGeneration, T5ForSentimentClassification
from tests import tiny_run


class LaunchedPass(cuda_graphs.RecordedPass):
    """What a recording promises, launched each time: one set of inputs that is written over, and gradients that are added to."""

    def __init__(self, work, inputs):
        self.work, self.inputs = work, {name: values.clone() for name, values in inputs.items()}
        work(self.inputs)

    def __call__(self, inputs):
        for name, values in inputs.items():
            self.inputs[name].copy_(values)
        return self.work(self.inputs)


def test_the_loop_can_train_by_recorded_passes(tmp_path, monkeypatch):
    """Breaks when a short micro-batch is not filled up or counts in the loss, gradients are not cleared in place, or a pass divides
    by another step's number of labels. A step takes three micro-batches, and the first step's last is short.
    """
    options = {"dropout": 0.0, "rows_per_step": 6, "rows_per_micro_batch": 2}
    expected = tiny_run.run(tmp_path / "expected", **options).log
    monkeypatch.setattr(gradients, "RecordedPass", LaunchedPass)
    monkeypatch.setattr(gradients, "can_record", lambda *_: True)
    found = tiny_run.run(tmp_path / "found", cuda_graphs=True, **options).log
    for a, b in zip(tiny_run.without_clocks(expected), tiny_run.without_clocks(found), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize("pooling", ["encoder_mean", "decoder_eos"])
def test_a_classifying_pass_never_waits_for_its_device(monkeypatch, pooling):
    """The same of both heads: one that looks for a missing end of sequence on the GPU cannot be recorded."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = T5ForSentimentClassification(tiny_run.model_with().config, pooling=pooling).to("meta").train()
    batch = {key: values.to("meta") for key, values in tiny_run.source().epoch(0).batch(0, 2).items()}
    labels = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    items = torch.ones((), dtype=torch.int64, device="meta")
    model(batch["input_ids"], encoder_segment_ids=batch["encoder_segment_ids"], labels=labels, num_items_in_batch=items).loss.backward()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_pass_never_waits_for_its_device(monkeypatch, dropout):
    """Breaks when forward or backward ask the device for a value, which no recording survives: a tensor on `meta` has none to give."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # autocast knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    config = tiny_run.model_with(dropout_rate=dropout).config
    model = T5ForConditionalGeneration(config).to("meta").train()
    batch = {key: values.to("meta") for key, values in tiny_run.source().epoch(0).batch(0, 2).items()}
    model(**batch, num_items_in_batch=torch.ones((), dtype=torch.int64, device="meta")).loss.backward()
    assert model.lm_head.weight.grad is not None
