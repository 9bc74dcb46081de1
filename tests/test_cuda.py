"""What only a GPU can show: 16-bit training as exact as the plain formula in the same format, and the loop's promises there."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import T5Config

from src import fast_attention
from src.compilation import compiled_blocks
from src.config import FinetuningSettings
from src.cuda_graphs import RecordedPass
from src.modeling_t5 import T5ForConditionalGeneration
from src.optimizers import build_optimizer
from tests import tiny_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model_and_batch(rows=3, source=200, target=70):
    """A small T5 whose attention and biases matter, and a packed batch."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=500, d_model=64, d_kv=32, d_ff=128, num_heads=2, num_layers=2, dropout_rate=0.0, decoder_start_token_id=0)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "relative" in name else 1)
    segments = [torch.nn.functional.pad(torch.randint(1, 5, (rows, n - 9)).sort(dim=1).values, (0, 9)) for n in (source, target)]
    labels = torch.randint(2, 500, (rows, target)).masked_fill(segments[1] == 0, -100)
    batch = {"input_ids": torch.randint(2, 500, (rows, source)), "labels": labels}
    return model, batch | {"encoder_segment_ids": segments[0], "decoder_segment_ids": segments[1]}


def gradients_of(model, batch, dtype, kernel="auto", compiled=False):
    model.zero_grad()
    model.set_attention_kernel(kernel)
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None), compiled_blocks(model, compiled):
        loss = model.train()(**{key: values.to(device) for key, values in batch.items()}).loss
        (loss * 1024).backward()
    return {name: parameter.grad.double().cpu() / 1024 for name, parameter in model.named_parameters()} | {
        "loss": loss.detach().double().cpu()
    }


@pytest.mark.parametrize(("dtype", "compiled"), [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)])
def test_packed_rows_train_as_exactly_as_the_plain_formula(monkeypatch, dtype, compiled):
    """Breaks when the kernel, the fused loss or the norm lose more than 16 bits must, or when the kernel is not reached at all."""
    model, batch = model_and_batch()
    expected = gradients_of(model.double(), batch, None, "plain")
    calls, kernel = [], fast_attention.packed_attention
    monkeypatch.setattr(fast_attention, "packed_attention", lambda *arguments: calls.append(1) or kernel(*arguments))
    model = model.float().cuda()
    plain, found = gradients_of(model, batch, dtype, "plain"), gradients_of(model, batch, dtype, compiled=compiled)
    assert calls
    for name, exact in expected.items():
        size = exact.norm() + 1e-12
        assert (found[name] - exact).norm() / size < 2 * (plain[name] - exact).norm() / size + 2e-3, name


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_loop_learns_and_resumes_in_every_format(tmp_path, capsys, precision):
    """Breaks when scaler, optimizer or checkpoints mix devices: the loss must fall, and a run that lost its end must end as it did."""
    whole = tiny_run.run(tmp_path, precision=precision, dropout=0.0)
    losses = [record["loss"] for record in whole.log if "loss" in record]
    assert losses[-1] < losses[0]
    shutil.rmtree(max(whole.folder.glob("step-*")))
    resumed = tiny_run.run(tmp_path, precision=precision, dropout=0.0)
    assert "resumed at step 20" in capsys.readouterr().out
    assert resumed.state.step == whole.state.step
    assert [record["loss"] for record in resumed.log if "loss" in record] == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize(("precision", "compiled"), [("bf16", False), ("fp16", False), ("bf16", True)])
def test_recorded_passes_train_as_launched_ones(tmp_path, monkeypatch, precision, compiled):
    """Breaks when a replay reads an old batch, adds to gradients that were not cleared, or divides by another step's labels.

    A step takes three micro-batches, the first step's last is short, and an epoch takes several steps.
    """
    monkeypatch.setattr(tiny_run, "MODEL", replace(tiny_run.MODEL, d_kv=16))  # a width that our kernel takes
    options = {"precision": precision, "compile": compiled, "dropout": 0.0, "rows_per_step": 6, "rows_per_micro_batch": 2}
    launched, recorded = (tiny_run.run(tmp_path / name, cuda_graphs=name == "recorded", **options).log for name in ("launched", "recorded"))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(launched, recorded, strict=True) if "loss" in a]
    assert pairs[-1][0] < pairs[0][0]
    assert all(b == pytest.approx(a, rel=1e-2) for a, b in pairs)


def test_recorded_passes_draw_new_dropout():
    """Breaks when the seed of the recording is replayed: on one batch losses would agree."""
    model, batch = model_and_batch()
    model.config.dropout_rate = 0.3
    model = T5ForConditionalGeneration(model.config).cuda().train()

    def work(inputs):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    recorded, losses = RecordedPass(work, batch | {"num_items_in_batch": torch.tensor(100)}), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(float(recorded(batch)))
    assert losses[0] == losses[2] != losses[1]


def test_out_of_memory_halves_the_micro_batch(tmp_path, monkeypatch, capsys):
    """Breaks when a real CUDA error is not the one the loop waits for: the losses must be those of the smaller micro-batch."""
    forward = T5ForConditionalGeneration.forward

    def greedy(self, input_ids=None, **inputs):
        if self.training and len(input_ids) > 1:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return forward(self, input_ids=input_ids, **inputs)

    expected = tiny_run.run(tmp_path / "expected", rows_per_micro_batch=1, dropout=0.0).log
    monkeypatch.setattr(T5ForConditionalGeneration, "forward", greedy)
    found = tiny_run.run(tmp_path / "found", dropout=0.0).log
    assert "out of memory" in capsys.readouterr().out
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found, expected, strict=True) if "loss" in a]
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)


def test_the_paged_optimizer_trains():
    """Breaks when bitsandbytes' CUDA part is missing or refuses our groups: the loss must fall."""
    model, batch = model_and_batch()
    model.cuda()
    settings = FinetuningSettings(max_steps=1, optimizer="paged_adamw_8bit", learning_rate=3e-3)
    optimizer, losses = build_optimizer(model, settings), []
    for _ in range(20):
        gradients = gradients_of(model, batch, torch.bfloat16)
        losses.append(float(gradients["loss"]))
        for parameter in model.parameters():
            parameter.grad /= 1024
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
