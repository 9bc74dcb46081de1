"""The model against stock `transformers`: values, gradients, checkpoints, decoding."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import T5Config

from src.modeling_t5 import T5ForConditionalGeneration
from tests.small_t5 import CASES, SIZES, V10, V11, config_of, packed_row, padded_batch, relative, stock_checkpoint


@pytest.mark.parametrize("kernel", ["auto", "plain"])
@pytest.mark.parametrize(("version", "size"), CASES)
def test_logits_loss_and_gradients_are_those_of_stock(tmp_path, version, size, kernel):
    """Breaks when any formula departs from T5: the independent implementation decides."""
    stock, batch = stock_checkpoint(tmp_path, version, size), padded_batch()
    ours = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours.set_attention_kernel(kernel)
    expected, found = stock(**batch), ours(**batch)
    assert (found.logits - expected.logits).abs().max() < 1e-5 * max(1.0, float(expected.logits.detach().abs().max()))
    assert relative(found.loss, expected.loss) < 1e-5
    expected.loss.backward()
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert set(gradients) == {name for name, _ in stock.named_parameters()}
    for name, parameter in stock.named_parameters():
        assert relative(gradients[name], parameter.grad) < 1e-5, name


@pytest.mark.parametrize("version", [V10, V11])
def test_training_in_float32_is_stocks(tmp_path, version):
    """Breaks when the loss without logits, or the embeddings' gradients beside it, depart from T5, for the longest distances, too."""
    stock, batch = stock_checkpoint(tmp_path, version, SIZES[0]).train(), padded_batch(source=300, target=160)
    ours = T5ForConditionalGeneration.from_pretrained(tmp_path).train()
    expected, found = stock(**batch).loss, ours(**batch).loss
    assert relative(found, expected) < 1e-5
    expected.backward()
    found.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        assert relative(gradients[name].to_dense(), parameter.grad) < 1e-5, name


@pytest.mark.parametrize("version", [V10, V11])
def test_checkpoints_interchange_in_a_process_without_src(tmp_path, version):
    """Breaks when our files are anything but a stock checkpoint: safetensors, tied weights once, no trace of `src`."""
    stock, batch = stock_checkpoint(tmp_path / "stock", version, SIZES[0]), padded_batch()
    T5ForConditionalGeneration.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    torch.save({**batch, "logits": stock(**batch).logits}, tmp_path / "expected.pt")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("ours", "stock")]
    assert abs(sizes[0] - sizes[1]) < 1000
    script = (
        "import sys, torch, transformers\n"
        "data = torch.load(sys.argv[2], weights_only=True); logits = data.pop('logits')\n"
        "model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert 'src' not in sys.modules and type(model).__module__.startswith('transformers')\n"
        "assert (model(**data).logits - logits).abs().max() < 1e-5\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "ours"), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_initialisation_has_stocks_spread(projection):
    """Breaks when a factor is lost: T5 starts its weights at very different scales, and training depends on them."""
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=500, **sizes, decoder_start_token_id=0, initializer_factor=0.7, feed_forward_proj=projection)
    torch.manual_seed(0)
    expected = dict(transformers.T5ForConditionalGeneration(config).named_parameters())
    for name, parameter in T5ForConditionalGeneration(config).named_parameters():
        assert float(parameter.std()) == pytest.approx(float(expected[name].std()), rel=0.2 if "relative" in name else 0.04), name
        allowed = 6 * float(expected[name].std()) * parameter.numel() ** -0.5 + 1e-6
        assert abs(float(parameter.mean() - expected[name].mean())) < allowed, name


def test_training_step_matches_stock_in_bf16():
    """Breaks when the fast path loses more precision under autocast than stock T5 does."""
    config = config_of(V10, SIZES[0])
    torch.manual_seed(0)
    stock, batch = transformers.T5ForConditionalGeneration(config).train(), padded_batch()
    ours = T5ForConditionalGeneration(config).train()
    ours.load_state_dict(stock.state_dict())
    exact = torch.autograd.grad(stock(**batch).loss, list(stock.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(**batch).loss for model in (stock, ours)]
    errors = []
    for model, loss in zip((stock, ours), losses, strict=True):
        found = torch.autograd.grad(loss, list(model.parameters()))
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)) ** 0.5)
    assert errors[1] < 2 * errors[0]


def test_float16_survives_sums_that_overflow_it():
    """Breaks when the residual stream or the feed-forward sum is kept in float16: both leave its range here."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config_of(V10, SIZES[0])).eval()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[-1].DenseReluDense.wo.weight.mul_(3e4)
            block.layer[-1].DenseReluDense.wi.weight.mul_(20)
    batch = padded_batch()
    exact, found = model(**batch).logits, model.half()(**batch).logits
    assert found.isfinite().all()
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing_changes_nothing(packed, reentrant):
    """Breaks when a block is recomputed with other dropout, or the graph of the shared bias is walked once for each block."""
    config = config_of(V10, SIZES[0])
    config.dropout_rate = 0.1
    model = T5ForConditionalGeneration(config).train()
    batch = packed_row()[2] if packed else padded_batch()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        model(**batch).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for (name, _), before, after in zip(model.named_parameters(), *found, strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5, msg=name)


def test_every_dropout_of_t5_is_there(monkeypatch):
    """Breaks when one is left out: the model would learn another thing, and a step would look faster than it is."""
    calls = []

    def count(site):
        monkeypatch.setattr(site, lambda states, rate, training: calls.append((site.rpartition(".")[2], rate, training)) or states)

    for site in ("src.t5_stack.dropout", "src.t5_layers.dropout", "src.t5_layers.relu_dropout"):
        count(site)
    rates = []
    monkeypatch.setattr("src.t5_layers.attention", lambda q, k, v, bias, mask, heads, rate: rates.append(rate) or q)
    for version, gates in ((V10, "relu_dropout"), (V11, "dropout")):
        calls.clear(), rates.clear()
        config = config_of(version, SIZES[0])
        config.dropout_rate = 0.25
        T5ForConditionalGeneration(config).train()(**padded_batch())
        encoder, decoder = config.num_layers, config.num_decoder_layers
        sublayers, layers = 2 * encoder + 3 * decoder, encoder + decoder
        around = 2 * 2  # of each stack, after its embedding and after its last norm
        assert sorted(calls) == sorted([("dropout", 0.25, True)] * (around + sublayers) + [(gates, 0.25, True)] * layers)
        assert rates == [0.25] * (encoder + 2 * decoder)


def test_a_loop_by_hand_decodes_as_stock_does(tmp_path):
    """Breaks when `use_cache` is passed over: each step would see one token, at position 0, and write something else."""
    stock = stock_checkpoint(tmp_path, V10, SIZES[0])
    written = []
    for model in (stock, T5ForConditionalGeneration.from_pretrained(tmp_path).eval()):
        ids, past = [torch.tensor([[0], [0]])], None
        source = {"input_ids": torch.tensor([[5, 9, 17, 1], [44, 3, 1, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
        with torch.no_grad():
            for _ in range(8):
                output = model(**source, decoder_input_ids=ids[-1], past_key_values=past, use_cache=True)
                past = output.past_key_values
                ids.append(output.logits[:, -1:].argmax(-1))
        written.append(torch.cat(ids, dim=1))
    assert torch.equal(*written)


@pytest.mark.parametrize("kind", ["kv", "x+e"])
def test_with_a_cache_nothing_has_a_gradient(kind):
    """Breaks when a step with a cache takes part in a gradient: slim caches leave k and v out of it, and no error says so."""
    model = T5ForConditionalGeneration(config_of(V10, SIZES[0]))
    cache, step = model.new_cache(kind), {"input_ids": torch.tensor([[3, 5]]), "decoder_input_ids": torch.tensor([[7]])}
    for _ in range(2):
        assert not model(**step, past_key_values=cache).logits.requires_grad
    assert model(**step).logits.requires_grad
    assert cache.is_croppable  # `generate` asks this on Apple's devices


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_without_a_label_has_no_loss(training):
    """Breaks when a batch of texts whose labels are all ignored gives a loss that is not a number, or only in training."""
    model = T5ForConditionalGeneration(config_of(V10, SIZES[0])).train(training)
    for num_items in (None, 0, torch.tensor(0)):
        nothing = {"labels": torch.full((1, 4), -100), "num_items_in_batch": num_items}
        assert model(input_ids=torch.tensor([[3, 1]]), **nothing).loss.item() == 0
