"""The model against stock `transformers`, packed rows against single examples, and the errors a user meets."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import T5Config

from src.attention import SegmentError
from src.fused_loss import linear_cross_entropy
from src.input_checks import ModelError
from src.kv_cache import CacheError
from src.modeling_t5 import T5ForConditionalGeneration, T5ForSentimentClassification, mean_loss, shift_right

V10 = {"feed_forward_proj": "relu"}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIZES = (
    {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4},
    {"d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},  # inner width 16, not 48
)
CASES = [(version, size) for version in (V10, V11) for size in SIZES]


def config_of(version: dict, size: dict, **more) -> T5Config:
    return T5Config(vocab_size=120, dropout_rate=0.0, decoder_start_token_id=0, num_labels=3, **size, **version, **more)


def stock_checkpoint(folder, version: dict, size: dict):
    """A stock model with weights that make attention and bias matter, saved; v1.1 gets a head of its own."""
    torch.manual_seed(0)
    stock = transformers.T5ForConditionalGeneration(config_of(version, size)).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.mul_(4 if "relative" in name else 1)
    if version is V11:
        stock.lm_head.weight = torch.nn.Parameter(torch.randn_like(stock.lm_head.weight))
        stock.all_tied_weights_keys.pop("lm_head.weight", None)
    stock.save_pretrained(folder)
    return stock


def padded_batch(rows: int = 5, source: int = 17, target: int = 9):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, 120, (rows, source), generator=generator)
    labels = torch.randint(2, 120, (rows, target), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(rows):
        attention_mask[row, source - 3 * row :] = 0 if row else 1
        labels[row, target - row :] = -100 if row else labels[row, target - row :]
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask, "labels": labels}


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((ours - expected).norm() / expected.norm().clamp(min=1e-12)).detach())


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


def packed_row():
    """Three examples, their packed row, and its padding at the end of both sides."""
    generator = torch.Generator().manual_seed(2)
    sources = [torch.randint(2, 120, (1, n), generator=generator) for n in (5, 9, 3)]
    targets = [torch.randint(2, 120, (1, n), generator=generator) for n in (4, 2, 6)]
    row = {
        "input_ids": torch.cat([*sources, torch.zeros(1, 3, dtype=torch.long)], dim=1),
        "labels": torch.cat([*targets, torch.full((1, 2), -100)], dim=1),
        "encoder_segment_ids": torch.tensor([[1] * 5 + [2] * 9 + [3] * 3 + [0] * 3]),
        "decoder_segment_ids": torch.tensor([[1] * 4 + [2] * 2 + [3] * 6 + [0] * 2]),
    }
    return sources, targets, row


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_packed_examples_are_what_they_are_alone(tmp_path, kernel):
    """Breaks when a token sees another example, when positions or the right shift cross a border, or weights of the loss differ."""
    stock_checkpoint(tmp_path, V10, SIZES[0])
    model = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    model.set_attention_kernel(kernel)
    sources, targets, row = packed_row()
    with torch.no_grad():
        found = model(**row)
        alone = [model(input_ids=source, labels=target) for source, target in zip(sources, targets, strict=True)]
    torch.testing.assert_close(found.logits[:, :12], torch.cat([one.logits for one in alone], dim=1), atol=1e-5, rtol=1e-5)
    mean = sum(one.loss * target.shape[1] for one, target in zip(alone, targets, strict=True)) / 12
    assert abs(float(found.loss - mean)) < 1e-5 * float(mean)
    changed = row["input_ids"].clone()
    changed[0, 5:14] = 7
    other = model(**{**row, "input_ids": changed}).logits
    kept = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert (other[0, kept] - found.logits[0, kept]).abs().max() < 1e-6
    assert (other[0, 4:6] - found.logits[0, 4:6]).abs().max() > 1e-3
    changed = row["labels"].clone()
    changed[0, 4:6] = 7
    other = model(**{**row, "labels": changed}).logits
    assert (other[0, kept] - found.logits[0, kept]).abs().max() < 1e-6


def test_shift_right_starts_every_segment():
    """The worked example of the design: breaks when an example is told the end of the one before it."""
    labels, segments = torch.tensor([[3, 8, 1, 9, 1]]), torch.tensor([[1, 1, 1, 2, 2]])
    assert shift_right(labels, segments, 0, 0).tolist() == [[0, 3, 8, 0, 9]]
    assert shift_right(torch.tensor([[3, -100]]), None, 0, 5).tolist() == [[0, 3]]


@pytest.mark.parametrize("num_items", [None, 40])
def test_fused_loss_is_the_plain_loss(monkeypatch, num_items):
    """Breaks when chunks, ignored labels or the divisor change the value or a gradient."""
    monkeypatch.setattr("src.fused_loss.CHUNK_BYTES", 70 * 4 * 50)
    monkeypatch.setattr("src.fused_loss.FLOAT_ROWS", 8)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 40, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (3, 40), generator=generator)
    labels[:, 25:] = -100
    expected, found = mean_loss(states @ weight.t(), labels, num_items), linear_cross_entropy(states, weight, labels, num_items)
    torch.testing.assert_close(found, expected)
    for plain, fused in zip(
        torch.autograd.grad(3 * expected, (states, weight)), torch.autograd.grad(3 * found, (states, weight)), strict=True
    ):
        torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(linear_cross_entropy(60 * states, weight, labels), mean_loss(60 * states @ weight.t(), labels, None))
    (frozen,) = torch.autograd.grad(3 * linear_cross_entropy(states, weight.detach(), labels, num_items), states)
    torch.testing.assert_close(frozen, torch.autograd.grad(3 * mean_loss(states @ weight.t(), labels, num_items), states)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_fused_loss_in_16_bits(monkeypatch, dtype, tolerance):
    """Breaks when float16 loses what is small in a large batch, or the gradient scaler's factor, which is more than it holds; and when
    a part of the products of bf16 goes to another's place."""
    monkeypatch.setattr("src.fused_loss.CPU_PIECES", 300)
    monkeypatch.setattr("src.fused_loss.CPU_ROWS", 70)
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(200, 16, generator=generator), torch.randn(800, 16, generator=generator)
    labels, scale, num_items = torch.randint(0, 800, (200,), generator=generator), 2.0**16, 50_000
    exact = [part.double().requires_grad_() for part in (states, weight)]
    expected = torch.autograd.grad(scale * mean_loss(exact[0] @ exact[1].t(), labels, num_items), exact)
    halves = states.to(dtype).requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(scale * linear_cross_entropy(*halves, labels, num_items), halves)
    for plain, fused in zip(expected, found, strict=True):
        assert (fused.double() - plain).norm() < tolerance * plain.norm()


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


def test_classifier_opens_in_stock_and_packs(tmp_path):
    """Breaks when `decoder_eos` departs from T5's own pooling, or when packed and single classification differ."""
    torch.manual_seed(0)
    model = T5ForSentimentClassification(config_of(V10, SIZES[0]), pooling="decoder_eos").eval()
    model.save_pretrained(tmp_path / "eos")
    stock = transformers.T5ForSequenceClassification.from_pretrained(tmp_path / "eos").eval()
    batch = padded_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[torch.arange(len(ids)), mask.sum(1) - 1] = 1
    torch.testing.assert_close(model(ids, mask).logits, stock(ids, mask).logits, atol=1e-5, rtol=1e-5)
    mean_model = T5ForSentimentClassification.from_pretrained(tmp_path / "eos", pooling="encoder_mean").eval()
    assert not hasattr(mean_model.transformer, "decoder")
    mean_model.save_pretrained(tmp_path / "mean")
    assert T5ForSentimentClassification.from_pretrained(tmp_path / "mean").config.pooling == "encoder_mean"
    sources, _, row = packed_row()
    row["input_ids"][0, [4, 13, 16]] = 1
    ends = [torch.cat([source[:, :-1], torch.ones(1, 1, dtype=torch.long)], dim=1) for source in sources]
    for classifier in (model, mean_model):
        packed = classifier(row["input_ids"], encoder_segment_ids=row["encoder_segment_ids"], labels=torch.tensor([[0, 2, 1, -100]]))
        assert packed.logits.shape == (1, 4, 3)
        alone = torch.stack([classifier(source).logits[0] for source in ends])
        torch.testing.assert_close(packed.logits[0, :3], alone, atol=1e-5, rtol=1e-5)
        expected = torch.nn.functional.cross_entropy(alone, torch.tensor([0, 2, 1]))
        torch.testing.assert_close(packed.loss, expected)


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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 2]], "a row has 3 examples and 2 labels: give each its label, or -100"),
        ([0, 2, 1], r"labels are \(3,\) for 1 rows: give \(1, most examples of a row\)"),
        ([[0, 7, 1]], "labels must be below 3"),
    ],
)
def test_labels_of_a_classifier_have_to_fit(labels, message):
    """Breaks when examples without a label are dropped in silence."""
    model, row = T5ForSentimentClassification(config_of(V10, SIZES[0])).eval(), packed_row()[2]
    with pytest.raises(ModelError, match=message):
        model(row["input_ids"], encoder_segment_ids=row["encoder_segment_ids"], labels=torch.tensor(labels))


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_without_a_label_has_no_loss(training):
    """Breaks when a batch of texts whose labels are all ignored gives a loss that is not a number, or only in training."""
    model = T5ForConditionalGeneration(config_of(V10, SIZES[0])).train(training)
    for num_items in (None, 0, torch.tensor(0)):
        nothing = {"labels": torch.full((1, 4), -100), "num_items_in_batch": num_items}
        assert model(input_ids=torch.tensor([[3, 1]]), **nothing).loss.item() == 0


def test_a_table_with_more_rows_takes_their_ids():
    """The stacks have configs of their own, which `resize_token_embeddings` does not change."""
    model = T5ForConditionalGeneration(config_of(V10, SIZES[0])).eval()
    model.resize_token_embeddings(150, mean_resizing=False)
    assert model(input_ids=torch.tensor([[130, 1]]), labels=torch.tensor([[149]])).logits.shape == (1, 1, 150)
    model.resize_token_embeddings(100, mean_resizing=False)
    with pytest.raises(ModelError, match="id 110 but the model's vocabulary has 100"):
        model.generate(torch.tensor([[110, 1]]))


def test_bad_input_is_refused_in_one_line(tmp_path):
    """Breaks when a user gets a stack trace from inside torch in place of what to change."""
    model = T5ForConditionalGeneration(config_of(V10, SIZES[0])).eval()
    _, _, row = packed_row()
    with pytest.raises(ModelError, match="use the tokenizer saved with the checkpoint"):
        model(input_ids=torch.tensor([[120]]), labels=torch.tensor([[1]]))
    with pytest.raises(ModelError, match="input_ids are not given, or empty"):
        model(input_ids=torch.zeros(1, 0, dtype=torch.long), labels=torch.tensor([[1]]))
    with pytest.raises(ModelError, match="pass labels to train"):
        model(input_ids=torch.tensor([[3]]))
    with pytest.raises(SegmentError, match="one segment id per token"):
        model(**{**row, "encoder_segment_ids": row["encoder_segment_ids"][:, 1:]})
    with pytest.raises(SegmentError, match="one segment id per token"):
        model(**{**row, "decoder_segment_ids": row["decoder_segment_ids"][:, 1:]})
    with pytest.raises(SegmentError, match="row 0 has targets of segment 4 and no source"):
        model(**{**row, "decoder_segment_ids": row["decoder_segment_ids"] + (row["decoder_segment_ids"] == 3)})
    with pytest.raises(SegmentError, match="one segment id per token"):
        encoded = model.encoder(row["input_ids"][:, 1:])
        model(**{**row, "input_ids": None, "encoder_outputs": encoded})
    with pytest.raises(SegmentError, match="packed rows cannot be decoded with a cache"):
        model(**row, past_key_values=model.new_cache("kv"))
    with pytest.raises(CacheError, match=r"a DynamicCache: make one with model\.new_cache"):
        model(input_ids=torch.tensor([[3]]), decoder_input_ids=torch.tensor([[0]]), past_key_values=transformers.DynamicCache())
    with pytest.raises(ModelError, match=r"labels are \(1, 2\) and decoder_input_ids \(1, 1\)"):
        model(input_ids=torch.tensor([[3]]), decoder_input_ids=torch.tensor([[0]]), labels=torch.tensor([[4, 1]]))
    for option in ({"decoder_inputs_embeds": torch.zeros(1, 1, 32)}, {"output_attentions": True}):
        with pytest.raises(
            ModelError, match=rf"{next(iter(option))}=\S+ is not supported here: open the checkpoint with stock transformers"
        ):
            model(input_ids=torch.tensor([[3]]), labels=torch.tensor([[1]]), **option)
    with pytest.raises(ModelError, match=r"encoder_segment_ids is unknown: models take .*, a stack segment_ids"):
        model.encoder(row["input_ids"], encoder_segment_ids=row["encoder_segment_ids"])
    with pytest.raises(ModelError, match=r"attention_mask is \(1, 1\) for tokens \(1, 3\)"):
        model(encoder_outputs=(torch.zeros(1, 3, 32),), attention_mask=torch.ones(1, 1), decoder_input_ids=torch.tensor([[0]]))
    with pytest.raises(ModelError, match="input_ids holds id 500 but the model's vocabulary has 120"):
        model.generate(torch.tensor([[500, 1]]))
    with pytest.raises(ModelError, match=r"inputs_embeds=\.\.\. is not supported"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ModelError):
        model.train()(input_ids=torch.tensor([[120]]), labels=torch.tensor([[1]]))
    assert not model.eval().encoder.embed_tokens.sparse  # what training asked of the table is taken back
    with pytest.raises(ModelError, match="labels holds id -1"):
        model(input_ids=torch.tensor([[3]]), labels=torch.tensor([[-1, -100]]))
    with pytest.raises(ModelError, match="decoder_input_ids holds id 120"):
        model(input_ids=torch.tensor([[3]]), decoder_input_ids=torch.tensor([[120]]))
    with pytest.raises(ModelError, match="for 2 tokens, of 3"):
        model.encoder(torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 2))
    with pytest.raises(SegmentError, match="encoder_segment_ids is missing"):
        model(**{**row, "encoder_segment_ids": None})
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="holds a 'bert' model"):
        T5ForConditionalGeneration.from_pretrained(tmp_path / "bert")
    model.encoder.block[1].layer[0].SelfAttention.q.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match=r"encoder.block.1.layer.0.SelfAttention.q.weight holds NaN"):
        T5ForConditionalGeneration.from_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match="choose encoder_mean or decoder_eos"):
        T5ForSentimentClassification(config_of(V10, SIZES[0]), pooling="max")
