"""Adapters on 4-bit bases: what is quantised, what is trained, what is saved, what is merged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from src import qlora
from src.config import FinetuningSettings
from src.modeling_t5 import T5ForConditionalGeneration, T5ForSentimentClassification
from src.optimizers import OptimizerError, build_optimizer
from src.qlora import AdapterError, QuantisationError

ROOT = Path(__file__).parent.parent
LAYERS = {"q", "k", "v", "o", "wi", "wo"}


def settings(**changes):
    return FinetuningSettings(max_steps=1, lora_rank=4, lora_alpha=16, precision="bf16", **changes)


def config(gated=False, d_model=96):
    return T5Config(
        vocab_size=120, d_model=d_model, d_kv=d_model // 4, d_ff=160, num_heads=4, num_layers=2, num_decoder_layers=2,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu" if gated else "relu",
        num_labels=3, pooling="encoder_mean", dropout_rate=0.0,
    )  # fmt: skip


@pytest.fixture
def base_folder(tmp_path):
    torch.manual_seed(0)
    T5ForConditionalGeneration(config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, model_class=T5ForConditionalGeneration):
    torch.manual_seed(1)  # the head of the classifier is new
    return model_class.from_pretrained(folder, config=config(), dtype=torch.bfloat16)


def adapted(folder, model_class=T5ForConditionalGeneration, quantised=True, **changes):
    model = load(folder, model_class)
    return qlora.add_adapters(qlora.quantise(model) if quantised else model, settings(**changes))


def batch(model_class):
    torch.manual_seed(2)
    input_ids = torch.randint(3, 120, (6, 12))
    input_ids[:, -1] = 1
    labels = torch.tensor([0, 1, 2, 0, 1, 2]) if model_class is T5ForSentimentClassification else torch.randint(3, 120, (6, 4))
    return {"input_ids": input_ids, "labels": labels}


def train(model, data, steps=30, learning_rate=5e-3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def frozen_bytes(model):
    """Every byte of the base: 4-bit codes, their scales, and the 16-bit rest."""
    frozen = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen[name] = parameter.detach().clone()
            if (state := getattr(parameter, "quant_state", None)) is not None:
                frozen[name + ".absmax"], frozen[name + ".nested"] = state.absmax.clone(), state.state2.absmax.clone()
    return frozen


@torch.no_grad()
def logits(model, data):
    with torch.autocast("cpu", torch.bfloat16):
        return model.eval()(**data).logits.float()


@pytest.mark.parametrize("width", [64, 96, 512])
def test_quantised_weights_are_close_to_the_original(width):
    """A block of 64 weights that crosses a row's end is dequantised with wrong scales on CPU: error .25 in place of .09."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config(d_model=width))
    original = {name: layer.weight.detach().clone() for name, layer in qlora.block_linears(model).items()}
    for name, layer in qlora.block_linears(qlora.dequantise(qlora.quantise(model))).items():
        error = (layer.weight - original[name]).norm() / original[name].norm()
        assert 0.05 < error < 0.1, f"{name} {tuple(layer.weight.shape)}: relative error {error:.3f}"


def test_square_weights_are_not_transposed():
    """512 x 512 weights fit either way round; a transposed one gives numbers that look fine and mean nothing."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config(d_model=512))
    states = torch.randn(3, 512, dtype=torch.bfloat16)
    expected = {name: states.float() @ layer.weight.t() for name, layer in qlora.block_linears(model).items() if layer.in_features == 512}
    assert any(layer.in_features == layer.out_features == 512 for layer in qlora.block_linears(model).values())
    for name, layer in qlora.block_linears(qlora.quantise(model)).items():
        if name in expected:
            error = (layer(states).float() - expected[name]).norm() / expected[name].norm()
            assert error < 0.15, f"{name}: relative error {error:.3f}"


@pytest.mark.parametrize("gated", [False, True])
def test_every_linear_layer_of_the_blocks_carries_an_adapter(gated):
    """`wo` is what a quantised T5 silently leaves out; the heads must stay as they are."""
    model = qlora.add_adapters(qlora.quantise(T5ForConditionalGeneration(config(gated)).to(torch.bfloat16)), settings())
    quantised = {name for name, module in model.named_modules() if qlora.is_quantised(module) and name.endswith("base_layer")}
    with_adapter = {name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    expected = LAYERS - {"wi"} | {"wi_0", "wi_1"} if gated else LAYERS
    assert {name.split(".")[-1] for name in with_adapter} == expected
    feed_forward = 3 if gated else 2
    assert len(with_adapter) == 2 * (4 + feed_forward) + 2 * (8 + feed_forward)  # blocks of the encoder, blocks of the decoder
    assert {name.removesuffix(".base_layer") for name in quantised} == with_adapter
    assert isinstance(model.get_base_model().lm_head, nn.Linear)
    assert not qlora.is_quantised(model.get_base_model().lm_head)


def test_the_stacks_share_one_adapter_of_their_embeddings(base_folder):
    """Two adapters of one table would be two tables, which no T5 checkpoint can hold: merged, it would predict something else."""
    model = adapted(base_folder)
    stacks = [model.get_base_model().encoder, model.get_base_model().decoder]
    own = [dict(stack.embed_tokens.named_parameters()) for stack in stacks]
    assert {name for name, parameter in own[0].items() if parameter.requires_grad} == {
        "lora_embedding_A.default",
        "lora_embedding_B.default",
    }
    assert all(own[0][name] is own[1][name] for name in own[0])


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": False}], ids=["rslora", "dora", "lora"])
def test_training_learns_and_leaves_the_base_as_it_is(base_folder, changes):
    """If the 4-bit base moved, or was repacked for a faster kernel, the saved adapter would belong to a base that is nowhere."""
    model = adapted(base_folder, **changes)
    before, data = frozen_bytes(model), batch(T5ForConditionalGeneration)
    logits(model, data)
    losses = train(model.train(), data)
    logits(model, data)
    assert losses[-1] < 0.05 * losses[0]
    after = frozen_bytes(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_scale_of_the_adapter_is_the_one_asked_for(base_folder):
    """rsLoRA divides by the root of the rank, LoRA by the rank: mixed up, the learning rate is off by a factor."""
    for rslora, expected in ((True, 16 / 4**0.5), (False, 16 / 4)):
        layer = next(m for m in adapted(base_folder, use_rslora=rslora).modules() if hasattr(m, "lora_A") and hasattr(m, "scaling"))
        assert layer.scaling["default"] == expected


def test_no_activation_becomes_an_integer(base_folder):
    """A feed-forward that casts its input to the dtype of a 4-bit `wo` turns activations into uint8: noise instead of an error."""
    model, seen = adapted(base_folder), set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, inputs: seen.update(t.dtype for t in inputs if torch.is_tensor(t)))
        module.register_forward_hook(lambda _, __, output: seen.update({output.dtype} if torch.is_tensor(output) else set()))
    data = batch(T5ForConditionalGeneration)
    with torch.autocast("cpu", torch.bfloat16):
        model(**data).loss.backward()
    assert seen <= {torch.int64, torch.bfloat16, torch.float32}
    assert torch.bfloat16 in seen


def test_head_is_saved_and_survives_a_fresh_process(base_folder, tmp_path):
    """A head left out of the adapter comes back random, and the classifier guesses without any error."""
    model, data = adapted(base_folder, T5ForSentimentClassification), batch(T5ForSentimentClassification)
    train(model.train(), data)
    qlora.save_adapter(model, tmp_path / "adapter", base_folder)
    torch.save({"logits": logits(model, data), "data": data}, tmp_path / "expected.pt")
    code = """
import sys, torch
from pathlib import Path
from tests import test_qlora as here
folder = Path(sys.argv[1])
saved = torch.load(folder / "expected.pt", weights_only=True)
base = here.load(folder / "base", here.T5ForSentimentClassification)
base.classification_head.out_proj.weight.data.normal_()  # another head than the one that training began with
model = here.qlora.load_adapter(base, folder / "adapter", folder / "base")
found = here.logits(model, saved["data"])
assert torch.equal(found, saved["logits"]), (found - saved["logits"]).abs().max()
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("changes", [{"quantised": True}, {"quantised": False}, {"quantised": True, "use_dora": True}], ids=str)
def test_merged_model_is_stock_and_predicts_the_same(base_folder, tmp_path, changes):
    """Merging onto the original instead of the dequantised weights gives another model than the one that was judged."""
    model, data = adapted(base_folder, **changes), batch(T5ForConditionalGeneration)
    train(model.train(), data, learning_rate=2e-3)  # a larger adapter drowns the base, and rounding it drowns what is tested
    qlora.save_adapter(model, tmp_path / "adapter", base_folder)
    merged = qlora.merge_to_16_bit(load(base_folder), tmp_path / "adapter", base_folder)
    merged.save_pretrained(tmp_path / "merged")
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert type(stock).__module__.startswith("transformers.")
    assert stock.dtype == torch.bfloat16
    assert torch.equal(stock.encoder.embed_tokens.weight, stock.decoder.embed_tokens.weight)
    assert not stock.config.scale_decoder_outputs  # the output layer keeps what the embeddings were before they had an adapter
    expected, found = logits(model, data), logits(stock, data)
    assert torch.equal(expected.argmax(-1), found.argmax(-1))
    distance = (expected.softmax(-1) - found.softmax(-1)).abs().max()
    assert distance < 0.02
    if changes == {"quantised": True}:
        wrong = qlora.merge(qlora.attach(load(base_folder).float(), tmp_path / "adapter"))
        assert (expected.softmax(-1) - logits(wrong, data).softmax(-1)).abs().max() > 2 * distance


def test_merged_classifier_predicts_the_same(base_folder, tmp_path):
    """It has no decoder to share the embeddings' adapter with, and a head that is merged with nothing."""
    model, data = adapted(base_folder, T5ForSentimentClassification), batch(T5ForSentimentClassification)
    train(model.train(), data, learning_rate=2e-3)
    qlora.save_adapter(model, tmp_path / "adapter", base_folder)
    merged = qlora.merge_to_16_bit(load(base_folder, T5ForSentimentClassification), tmp_path / "adapter", base_folder)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert (logits(model, data).softmax(-1) - logits(merged, data).softmax(-1)).abs().max() < 0.02


def test_adapter_of_another_base_is_refused(base_folder, tmp_path):
    """Adapter and base that do not belong together load without a word and predict nonsense."""
    qlora.save_adapter(adapted(base_folder), tmp_path / "adapter", base_folder)
    torch.manual_seed(9)
    T5ForConditionalGeneration(config()).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="belongs to base") as error:
        qlora.load_adapter(load(tmp_path / "other"), tmp_path / "adapter", tmp_path / "other")
    assert "\n" not in str(error.value)
    with pytest.raises(AdapterError, match="belongs to base"):
        qlora.merge_to_16_bit(load(tmp_path / "other"), tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(AdapterError, match=r"safetensors is missing: name the folder of a whole checkpoint"):
        qlora.read_base(tmp_path / "adapter", tmp_path)


def test_adapter_without_a_head_is_refused_by_a_classifier(base_folder, tmp_path):
    """The text-to-text adapter on a classifier would leave a random head in charge."""
    qlora.save_adapter(adapted(base_folder), tmp_path / "adapter", base_folder)
    with pytest.raises(AdapterError, match="holds no classification_head"):
        qlora.load_adapter(load(base_folder, T5ForSentimentClassification), tmp_path / "adapter", base_folder)
    (tmp_path / "adapter" / qlora.BASE_FILE).unlink()
    with pytest.raises(AdapterError, match=r"base\.json is missing"):
        qlora.load_adapter(load(base_folder), tmp_path / "adapter", base_folder)


def test_without_bitsandbytes_one_line_offers_a_way_out(base_folder, monkeypatch):
    """Colab has no bitsandbytes: an ImportError from deep inside helps nobody."""
    find_spec = qlora.importlib.util.find_spec
    monkeypatch.setattr(qlora.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(QuantisationError, match=r"pip install bitsandbytes.*lora") as error:
        qlora.quantise(load(base_folder))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA the optimizer is there")
def test_paged_optimizer_without_cuda_names_another(base_folder):
    """bitsandbytes fails at the first step, deep inside, where there is no CUDA device."""
    with pytest.raises(OptimizerError, match="needs a CUDA device: choose adamw"):
        build_optimizer(adapted(base_folder), settings(optimizer="paged_adamw_8bit"))


def test_parameter_table_counts_what_is_there(base_folder):
    """Packed 4-bit weights hold two parameters a byte, and peft keeps a second head: both are easily counted wrong."""
    whole = load(base_folder, T5ForSentimentClassification)
    table = qlora.parameter_table(adapted(base_folder, T5ForSentimentClassification)).set_index("part")
    linear = sum(layer.weight.numel() for layer in qlora.block_linears(whole).values())
    assert table.loc["4-bit linear layers", "parameters"] == linear
    assert 0.5 < table.loc["4-bit linear layers", "mebibytes"] * qlora.MEBIBYTE / linear < 0.6  # bytes each: 4 bits and the scales
    assert table.loc["head", "parameters"] == sum(p.numel() for p in whole.classification_head.parameters())
    adapters = sum(4 * (layer.in_features + layer.out_features) for layer in qlora.block_linears(whole).values())
    adapters += 4 * sum(whole.get_input_embeddings().weight.shape)
    assert table.loc["adapters", "trainable"] == adapters
    assert table["parameters"].sum() == sum(p.numel() for p in whole.parameters()) + adapters
    assert json.loads(table.to_json())  # no NumPy surprise on the way into a manifest
