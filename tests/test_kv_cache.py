"""Every cache kind writes the tokens of stock T5, K-caches prove themselves, and memory is what is promised."""

import warnings

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import T5Config

from src.kv_cache import CACHE_KINDS, Buffer, CacheError, KeyLayer
from src.modeling_t5 import T5ForConditionalGeneration
from src.qlora import quiet_peft
from src.slim_attention import effective_weight, key_to_value
from tests.small_t5 import V10, V11


def pair(version: dict = V10, num_heads: int = 4, layers: int = 2):
    """(stock, ours) with the same weights, their attention sharpened so that tokens depend on it."""
    config = T5Config(
        vocab_size=150,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=layers,
        num_heads=num_heads,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        **version,
    )
    torch.manual_seed(0)
    stock = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.mul_(3 if "relative" in name else 1.5)
    ours = T5ForConditionalGeneration(config).eval()
    if version is V11:  # with a head of its own, which no new model has, whatever its config says
        for model in (stock, ours):
            model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def prompts(rows: int = 100, length: int = 14):
    """Rows of unequal lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 150, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=generator)).long()
    return ids * mask, mask


@pytest.fixture(scope="module", params=[V10, V11], ids=["v1.0", "v1.1"])
def models(request):
    return pair(request.param)


MODES = {
    "greedy": {},
    "beam-4": {"num_beams": 4},
    "sampling": {"do_sample": True, "top_k": 20},
    "prompt": {"decoder_input_ids": torch.tensor([[0, 5, 9, 2]]).expand(100, -1)},
    "beam-prompt": {"num_beams": 3, "decoder_input_ids": torch.tensor([[0, 7, 9]]).expand(100, -1), "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_writes_stocks_tokens(models, mode):
    """Breaks when a cache misplaces a token, forgets a beam's past, or mixes up rows of unequal lengths."""
    stock, ours = models
    ids, mask = prompts()
    arguments = {"attention_mask": mask, "max_new_tokens": 10, **MODES[mode]}
    torch.manual_seed(1)
    expected = stock.generate(ids, **arguments)
    assert len(expected[:, 1:].unique()) > 30
    for kind in CACHE_KINDS:
        torch.manual_seed(1)
        assert torch.equal(ours.generate(ids, cache_kind=kind, **arguments), expected), kind


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_assisted_generation_forgets_what_it_rejects(kind):
    """Guessed tokens that stay in the cache are attended to; without a way to drop them `generate` ends in an AttributeError."""
    stock, model = pair(layers=3)
    ids, mask = prompts(5)
    forced = torch.tensor([[0, 7, 9, 7, 8, 7, 9, 7, 8, 7]])  # what is guessed from: the model goes on otherwise
    for row in range(5):
        arguments = {"attention_mask": mask[row : row + 1], "max_new_tokens": 12, "decoder_input_ids": forced}
        expected = stock.generate(ids[row : row + 1], **arguments)
        found = model.generate(ids[row : row + 1], prompt_lookup_num_tokens=3, cache_kind=kind, **arguments)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_steps_are_the_whole_sequence(kind):
    """Breaks when decoding in steps of one or several tokens departs from the forward pass over all of them."""
    _, model = pair()
    atol = 2e-4 if kind in ("k", "k+e") else 2e-5  # the k cache is accepted with V off by up to 1e-4
    ids, mask = prompts(6)
    forced = torch.randint(2, 150, (6, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        outputs = model.encoder(ids, attention_mask=mask)
        expected = model(attention_mask=mask, decoder_input_ids=forced, encoder_outputs=outputs).logits
        for capacity in (9, None):
            cache = model.new_cache(kind, capacity, calibration_ids=ids)
            steps = [
                model(attention_mask=mask, decoder_input_ids=part, encoder_outputs=outputs, past_key_values=cache).logits
                for part in forced.split([1, 3, 1, 1, 2, 1], dim=1)
            ]
            torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=atol, rtol=1e-4)
            assert cache.get_seq_length() == 9


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_steps_heed_the_decoder_mask(kind):
    """Breaks when a mask over the tokens so far does not fit the room for tokens to come, or opens it."""
    _, model = pair()
    ids, mask = prompts(6)
    forced = torch.randint(2, 150, (6, 9), generator=torch.Generator().manual_seed(4))
    seen = torch.ones(6, 9, dtype=torch.long)
    seen[:3, 1:3] = 0
    with torch.no_grad():
        outputs = model.encoder(ids, attention_mask=mask)
        rest = {"attention_mask": mask, "encoder_outputs": outputs}
        expected = model(decoder_input_ids=forced, decoder_attention_mask=seen, **rest).logits
        cache = model.new_cache(kind, calibration_ids=ids)
        steps = [
            model(decoder_input_ids=forced[:, i : i + 1], decoder_attention_mask=seen[:, : i + 1], past_key_values=cache, **rest).logits
            for i in range(9)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=2e-4, rtol=1e-4)


def test_buffers_grow_by_blocks_and_hand_out_whole_ones():
    """Breaks when a step's operand is part of its memory (a product would copy it), holds garbage, or a capacity leaves room over."""
    buffer = Buffer(1, 70)
    assert [buffer.room_for(length) for length in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 70]
    assert [Buffer(1, None).room_for(length) for length in (65, 96, 97)] == [96, 96, 128]
    for length in range(1, 71):
        keys = buffer.append(torch.full((2, 1, 3), float(length)), buffer.room_for(length))
        assert keys.is_contiguous()
        assert keys[0, :, 0].tolist() == [*range(1, length + 1), *[0] * (keys.shape[1] - length)]
    assert buffer.view().shape == buffer.data.shape == (2, 70, 3)


def test_16_bit_errors_are_those_of_the_standard_cache():
    """Breaks when a rearranged product loses accuracy: in bf16 a slim cache may be off at most twice as far as `kv`."""
    _, model = pair(layers=3)
    with torch.no_grad():  # W_K that V can be had from in 16 bit: otherwise every layer would use X, and K go unproved
        for block in model.decoder.block:
            key = block.layer[0].SelfAttention.k
            left, sizes, right = torch.linalg.svd(key.weight)
            key.weight.copy_(sizes.mean() * left @ right)
    ids, mask = prompts(16)
    forced = torch.randint(2, 150, (16, 12), generator=torch.Generator().manual_seed(4))
    model.bfloat16()
    _, exact = pair(layers=3)
    exact.load_state_dict(model.state_dict())
    exact.double()
    errors = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model.encoder(ids, attention_mask=mask)
        exact_outputs = (outputs.last_hidden_state.double(),)
        expected = exact(attention_mask=mask, decoder_input_ids=forced, encoder_outputs=exact_outputs).logits
        for kind in CACHE_KINDS:
            cache = model.new_cache(kind, 12, calibration_ids=ids)
            if kind in ("k", "k+e"):
                assert all(isinstance(cache.of_layer(layer)[0], KeyLayer) for layer in range(3))
            steps = [
                model(attention_mask=mask, decoder_input_ids=forced[:, i : i + 1], encoder_outputs=outputs, past_key_values=cache).logits
                for i in range(12)
            ]
            errors[kind] = float((torch.cat(steps, dim=1) - expected).abs().max())
    assert all(error < 2 * errors["kv"] for error in errors.values()), errors


@pytest.mark.parametrize("kind", ["kv", "x+e"])
def test_a_cache_that_is_reset_knows_nothing(kind):
    """Breaks when rearranged weights outlive those of the model, which may have been trained on since."""
    _, model = pair()
    ids, mask = prompts(3)
    cache, token = model.new_cache(kind), torch.full((3, 1), 5)

    def second_step(cache):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # in which rearranged weights are copies
            return [model(ids, attention_mask=mask, decoder_input_ids=token, past_key_values=cache).logits for _ in range(2)][1]

    before = second_step(cache)
    with torch.no_grad():
        for parameter in model.decoder.block.parameters():
            parameter.mul_(1.5)
    cache.reset()
    after = second_step(cache)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, second_step(model.new_cache(kind)))


def test_bytes_are_those_of_the_arithmetic():
    """Breaks when a slim cache stores more than it says, or appending reallocates: sizes follow from the shapes."""
    _, model = pair(layers=6)
    source, target, rows, width, item = 32, 7, 3, 32, 4
    ids = torch.randint(2, 150, (rows, source))
    found = {}
    with torch.no_grad():
        outputs = model.encoder(ids)
        for kind in CACHE_KINDS:
            cache, addresses = model.new_cache(kind, target, calibration_ids=ids), set()
            for _ in range(target):
                model(decoder_input_ids=torch.full((rows, 1), 5), encoder_outputs=outputs, past_key_values=cache)
                addresses.add(tuple(buffer.data.data_ptr() for buffer in cache.buffers()))
            assert len(addresses) == 1, kind
            found[kind] = cache.num_bytes()
    own, cross = 6 * target * rows * width * item, 6 * source * rows * width * item
    assert found == {
        "kv": 2 * own + 2 * cross, "k": own + 2 * cross, "x": own + 2 * cross,
        "kv+e": 2 * own + cross // 6, "k+e": own + cross // 6, "x+e": own + cross // 6,
    }  # fmt: skip


def test_k_cache_is_refused_where_v_from_k_is_wrong():
    """Breaks when a nearly singular W_K is used as if it were sound: its layer must use X, say so once, and write stock's tokens."""
    stock, ours = pair()
    ids, mask = prompts(20)
    for model in (stock, ours):
        with torch.no_grad():
            key = model.decoder.block[1].layer[0].SelfAttention.k.weight
            left, values, right = torch.linalg.svd(key.double())
            values[-4:] = 1e-9
            key.copy_(left @ values.diag() @ right)
    with pytest.warns(UserWarning, match=r"these layers use X .*\{1:"):
        found = ours.generate(ids, attention_mask=mask, max_new_tokens=8, cache_kind="k+e")
    assert torch.equal(found, stock.generate(ids, attention_mask=mask, max_new_tokens=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(ids, attention_mask=mask, max_new_tokens=2, cache_kind="k+e")
    cache = ours.new_cache("k+e")
    assert [type(layer).__name__ for layer in cache.layers] == ["KeyLayer", "StateLayer"]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CacheError, match="not calibrated"):
        ours.new_cache("k+e")  # what holds in float32 may not hold where K is rounded
    with torch.no_grad():
        ours.decoder.block[0].layer[0].SelfAttention.v.weight.mul_(2)
    with pytest.raises(CacheError, match="not calibrated for these weights"):
        ours.new_cache("k+e")


def test_projections_that_are_not_square_use_x():
    """Breaks when W_KV is sought where it does not exist (heads x d_kv is not d_model)."""
    stock, ours = pair(num_heads=2)
    ids, mask = prompts(10)
    with pytest.warns(UserWarning, match="these layers use X"):
        found = ours.generate(ids, attention_mask=mask, max_new_tokens=6, cache_kind="k+e")
    assert torch.equal(found, stock.generate(ids, attention_mask=mask, max_new_tokens=6))


def test_adapters_on_k_and_v_are_part_of_the_cache():
    """Breaks when a slim cache multiplies by the base weight and forgets the adapter that is active on it."""
    _, ours = pair()
    ids, mask = prompts(20)
    before = ours.generate(ids, attention_mask=mask, max_new_tokens=8)
    with quiet_peft():
        adapted = peft.get_peft_model(ours, peft.LoraConfig(r=4, target_modules=["q", "k", "v", "o", "wo"], init_lora_weights=False)).eval()
    expected = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, use_cache=False)
    assert not torch.equal(before, expected)
    for kind in CACHE_KINDS:
        assert torch.equal(adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, cache_kind=kind), expected), kind
    projection = adapted.base_model.model.decoder.block[0].layer[0].SelfAttention.k
    assert not torch.equal(effective_weight(projection, torch.float32), projection.base_layer.weight)
    projection.lora_B["default"] = nn.Linear(4, 32)  # as with `lora_bias=True`
    with pytest.raises(CacheError, match="adds a bias to k or v"):
        adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)


def test_kind_comes_from_the_argument_then_the_config(tmp_path):
    """Breaks when a saved default is lost, or an unknown kind runs silently as another."""
    _, ours = pair()
    ids, mask = prompts(3)
    arguments = {"attention_mask": mask, "max_new_tokens": 3, "return_dict_in_generate": True}
    assert ours.generate(ids, **arguments).past_key_values.kind == "x+e"
    ours.generation_config.cache_kind = "kv+e"
    ours.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.generate(ids, **arguments).past_key_values.kind == "kv+e"
    assert loaded.generate(ids, cache_kind="kv", **arguments).past_key_values.kind == "kv"
    with pytest.raises(CacheError, match="choose one of kv, k, x, kv"):
        ours.generate(ids, cache_kind="q", **arguments)
    with pytest.raises(CacheError, match="use cache_kind"):
        ours.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(CacheError, match="not calibrated"):
        ours.new_cache("k")


def test_key_to_value_and_buffer_by_hand():
    """Breaks when a transpose goes missing: square weights hide it until tokens are wrong."""
    key, value = nn.Linear(6, 6, bias=False).double(), nn.Linear(6, 6, bias=False).double()
    states = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(key(states) @ key_to_value(key.weight, value.weight), value(states))
    buffer = Buffer(1, 3)
    buffer.append(torch.tensor([[1, 2], [3, 4]]))
    assert buffer.append(torch.tensor([[5], [6]])).tolist() == [[1, 2, 5], [3, 4, 6]]
    buffer.select(torch.tensor([1, 1]))
    assert buffer.append(torch.tensor([[7], [8]])).tolist() == [[3, 4, 6, 7], [3, 4, 6, 8]]
