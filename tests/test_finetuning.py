"""Fine-tuning and inference: what is packed is what is meant, what is saved is what was judged, what was cut off goes on."""

import json

import bitsandbytes
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, T5Config

from src import finetuned_checkpoints, finetuning, inference
from src.collators import encode
from src.config import FinetuningSettings
from src.evaluation import NO_LABEL, PREDICTION_COLUMNS, PROBABILITY_COLUMNS
from src.finetuned_checkpoints import FinetuningError
from src.labels import LABELS, TASK_PREFIX, LabelError
from src.modeling_t5 import T5ForConditionalGeneration
from src.sample_data import sample_sentences
from src.tokenizer import train_tokenizer

WORDS = {0: ("fell", "sank", "lost"), 1: ("met", "kept", "named"), 2: ("rose", "gained", "won")}
FIRMS = ("Acme", "Borealis", "Cobalt", "Dune", "Ember")


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 3)
    texts = [f"{rng.choice(FIRMS)} {rng.choice(WORDS[label])} {rng.integers(1, 99)} percent" for label in labels]
    return pd.DataFrame({"text_id": [f"{seed}-{i}" for i in range(count)], "text": texts, "label": labels})


SPLITS = {"train": sentences(90, 0), "validation": sentences(30, 1), "test": sentences(30, 2)}


def settings(method="full", **changes):
    defaults = {
        "method": method, "learning_rate": 5e-3, "full_learning_rate": 3e-2, "inputs_length": 64, "targets_length": 32, "dropout_rate": 0.0,
        "rows_per_step": 4, "rows_per_micro_batch": 4, "warmup_steps": 5, "max_steps": 60, "evaluate_every": 20, "checkpoint_every": 20,
        "lora_rank": 16, "precision": "fp32",
    }  # fmt: skip
    return FinetuningSettings(**{**defaults, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A T5 checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    sample = [row["text"] for row in sample_sentences()[:1_000]]
    tokenizer = train_tokenizer([*SPLITS["train"]["text"], *[TASK_PREFIX + " ".join(LABELS)] * 20, *sample], folder, 500)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_heads=4, num_layers=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(7)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def loaded(task, base, **changes):
    return finetuned_checkpoints.load_base(task, base, settings(**changes)).eval(), finetuned_checkpoints.load_tokenizer(base)


@pytest.mark.parametrize("task", ["classification", "text_to_text"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_task_by_every_method_learns_and_is_saved_whole(base, tmp_path, task, method):
    """A combination that does not train, or whose saved model says something else than the one that was judged."""
    chosen = settings(method)
    tuned = finetuning.finetune(task, base, SPLITS, chosen, tmp_path / "checkpoints")
    metrics = tuned.metrics()
    assert metrics[0]["accuracy"] > 0.9
    assert list(tuned.test.columns) == list(PREDICTION_COLUMNS)
    assert set(tuned.test["text_id"]) == set(SPLITS["test"]["text_id"])
    assert set(tuned.validation["text_id"]) == set(SPLITS["validation"]["text_id"])
    if task == "text_to_text":
        assert metrics[1]["accuracy"] > 0.9
        assert tuned.generated["model"].unique().tolist() == [tuned.name + "_generated"]
    assert tuned.costs["trainable"] < tuned.costs["parameters"] or method == "full"
    (tmp_path / "saved").mkdir()
    finetuning.save_results(tmp_path / "saved", base, tuned, chosen, "default", tuned.test, metrics)
    model, tokenizer, about = finetuned_checkpoints.load_finetuned(tmp_path / "saved", base, chosen)
    assert (about["task"], about["method"], about["temperature"]) == (task, method, metrics[0]["temperature"])
    again = finetuning.predict_rows(task, model, tokenizer, SPLITS["test"], chosen, name=tuned.name)
    assert np.allclose(again[list(PROBABILITY_COLUMNS)], tuned.test[list(PROBABILITY_COLUMNS)], atol=1e-5)
    assert pd.read_parquet(tmp_path / "saved" / "predictions.parquet").equals(tuned.test.reset_index(drop=True))
    assert json.loads((tmp_path / "saved" / "metrics.json").read_text())[0]["accuracy"] == metrics[0]["accuracy"]


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_exported_model_is_stock_and_says_the_same(base, tmp_path, method):
    """The exported checkpoint is what people take elsewhere: it must open without this package and write the same labels."""
    chosen = settings(method)
    tuned = finetuning.finetune("text_to_text", base, SPLITS, chosen, tmp_path / "checkpoints")
    (tmp_path / "saved").mkdir()
    finetuned_checkpoints.save_finetuned(tmp_path / "saved", base, tuned.model, tuned.tokenizer, "text_to_text", chosen, 1.0, "default")
    finetuned_checkpoints.export_merged(tmp_path / "saved", base, chosen, tmp_path / "merged")
    # The 16-bit weights, computed with in float32 as the judged model is: rounding between layers may turn a tie.
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(stock).__module__.startswith("transformers.")
    written = inference.generate_labels(stock, tuned.tokenizer, SPLITS["test"]["text"].tolist(), chosen)
    assert inference.label_ids_of(written).tolist() == tuned.generated["prediction"].tolist()


def test_an_exported_classifier_is_stock_and_says_the_same(base, tmp_path):
    """Breaks when today's settings, in place of those it was trained with, decide where the exported head reads, or that is not where
    stock T5 does."""
    chosen = settings("qlora", pooling="decoder_eos", max_steps=40)
    tuned = finetuning.finetune("classification", base, SPLITS, chosen, tmp_path / "checkpoints")
    (tmp_path / "saved").mkdir()
    finetuned_checkpoints.save_finetuned(tmp_path / "saved", base, tuned.model, tuned.tokenizer, "classification", chosen, 1.0, "default")
    finetuned_checkpoints.export_merged(tmp_path / "saved", base, settings("qlora"), tmp_path / "merged")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert type(stock).__module__.startswith("transformers.")
    texts = SPLITS["test"]["text"].tolist()
    with torch.no_grad():
        found = stock(**tuned.tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1).numpy()
    expected = inference.class_probabilities(tuned.model, tuned.tokenizer, texts, chosen)
    assert np.ptp(expected, axis=0).min() > 0.05  # something was learned that could be lost
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_an_adapter_is_merged_onto_the_weights_that_it_was_trained_on(base, tmp_path):
    """In bf16 those are rounded before they are quantised, which moves some to another of the 16 levels."""
    chosen = settings("qlora", precision="bf16", max_steps=1, learning_rate=1e-9)  # an adapter that adds nothing
    tuned = finetuning.finetune("text_to_text", base, SPLITS, chosen, tmp_path / "checkpoints")
    (tmp_path / "saved").mkdir()
    finetuned_checkpoints.save_finetuned(tmp_path / "saved", base, tuned.model, tuned.tokenizer, "text_to_text", chosen, 1.0, "default")
    finetuned_checkpoints.export_merged(tmp_path / "saved", base, chosen, tmp_path / "merged")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    quantised = {name: module for name, module in tuned.model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) > 10
    for name, module in quantised.items():
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        stock = merged.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer")).weight
        torch.testing.assert_close(weight.bfloat16(), stock.detach().bfloat16(), rtol=1e-2, atol=1e-6, msg=name)


def test_an_adapter_stands_on_the_same_4_bits_on_another_device(base, tmp_path, monkeypatch):
    """A precision left to the device is bf16 on one and float32 on another: the base would be quantised from other numbers."""
    chosen = settings("qlora", precision="auto", max_steps=1)
    monkeypatch.setattr("src.precision.best_precision", lambda: "bf16")
    tuned = finetuning.finetune("classification", base, SPLITS, chosen, tmp_path / "checkpoints")
    (tmp_path / "saved").mkdir()
    finetuned_checkpoints.save_finetuned(tmp_path / "saved", base, tuned.model, tuned.tokenizer, "classification", chosen, 1.0, "default")
    monkeypatch.setattr("src.precision.best_precision", lambda: "fp32")
    model, _, _ = finetuned_checkpoints.load_finetuned(tmp_path / "saved", base, chosen)
    codes = [
        {name: module.weight.data for name, module in each.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
        for each in (tuned.model, model)
    ]
    assert len(codes[0]) > 5
    assert all(torch.equal(code, codes[1][name]) for name, code in codes[0].items())


@pytest.mark.parametrize("task", ["classification", "text_to_text"])
def test_packed_predictions_are_those_of_each_text_alone(base, task):
    """A text that sees its neighbours in the row, or gets the answer of another one, scores plausibly and wrongly."""
    model, tokenizer = loaded(task, base)
    function = inference.class_probabilities if task == "classification" else inference.label_likelihoods
    texts = [text * (1 + i % 4) for i, text in enumerate(SPLITS["test"]["text"])]  # of many lengths, so rows mix and order changes
    packed = function(model, tokenizer, texts, settings())
    alone = np.concatenate([function(model, tokenizer, [text], settings()) for text in texts])
    assert np.allclose(packed.sum(1), 1)
    assert np.allclose(np.log(packed), np.log(alone), atol=1e-4)  # logs: an untrained generator's probabilities are near 0 and 1
    assert np.log(packed).std(0).max() > 1e-2  # the texts differ, so a mix-up would show


def test_label_likelihoods_are_the_probabilities_of_the_words(base):
    """Against the definition, with stock T5: log p(label) is the sum over its tokens, eos included, and the three are normalised."""
    model, tokenizer = loaded("text_to_text", base)
    stock = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    texts, calls = SPLITS["test"]["text"].tolist()[:5], []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = inference.label_likelihoods(model, tokenizer, texts, settings())
    assert len(calls) == 1  # the five share a row, which is read once for all three labels
    for text, row in zip(texts, found, strict=True):
        inputs = tokenizer(TASK_PREFIX + text, return_tensors="pt").input_ids
        scores = []
        for label in LABELS:
            target = tokenizer(label, return_tensors="pt").input_ids
            assert target[0, -1] == 1
            with torch.no_grad():
                logs = stock(input_ids=inputs, labels=target).logits.log_softmax(-1)
            scores.append(float(logs.gather(-1, target[..., None]).sum()))
        assert np.allclose(row, torch.tensor(scores).softmax(0), atol=1e-5)


def test_only_the_exact_word_counts_as_a_label():
    """A generator that writes `bullish bullish` or `bull` has not answered."""
    written = ["bullish", "bull", "", "bearish bearish", "Neutral", "neutral"]
    assert inference.label_ids_of(written).tolist() == [2, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL, 1]


def test_what_is_written_around_a_label_is_no_label(base, monkeypatch):
    """A model of span corruption opens with a sentinel by habit: dropped in decoding, its answer would count as right."""
    model, tokenizer = loaded("text_to_text", base)
    answers = ["bullish</s>", "<extra_id_0> bullish</s>", "bearish</s><pad><pad>", "<pad> neutral</s>", "neutral"]
    ids = [[0, *tokenizer(answer, add_special_tokens=False)["input_ids"]] for answer in answers]
    output = torch.tensor([row + [0] * (max(map(len, ids)) - len(row)) for row in ids])
    monkeypatch.setattr(model, "generate", lambda **_: output)
    texts = ["text " * (1 + number) for number in range(len(answers))]  # in the order in which they are asked
    written = inference.generate_labels(model, tokenizer, texts, settings())
    assert inference.label_ids_of(written).tolist() == [2, NO_LABEL, 0, NO_LABEL, NO_LABEL]


def test_generation_is_free(base):
    """An untrained model must be able to answer with something that is no label, and the answers must keep the order of the texts."""
    model, tokenizer = loaded("text_to_text", base)
    texts = [text * (1 + i % 3) for i, text in enumerate(SPLITS["test"]["text"])]
    together = inference.generate_labels(model, tokenizer, texts, settings(), batch_size=7)
    assert together == [inference.generate_labels(model, tokenizer, [text], settings())[0] for text in texts]
    assert NO_LABEL in inference.label_ids_of(together)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the paged optimizer needs a GPU")
def test_adapters_learn_by_the_paged_optimizer(base, tmp_path):
    """4-bit weights, 16-bit products and paged 8-bit state together, as QLoRA's paper trains."""
    chosen = settings("qlora", optimizer="paged_adamw_8bit", precision="auto")
    assert finetuning.finetune("classification", base, SPLITS, chosen, tmp_path).metrics()[0]["accuracy"] > 0.9


def test_long_texts_are_cut_into_windows_that_lose_nothing(base):
    """Truncation drops the end of a long article, where the news may be."""
    model, tokenizer = loaded("classification", base)
    long = " ".join(SPLITS["train"]["text"].tolist())
    parts = inference.windows(long, tokenizer, 64)
    assert len(parts) > 5
    assert " ".join(parts).split() == long.split()
    of_special_words = inference.windows("<extra_id_0> " * 60, tokenizer, 64)
    assert max(len(ids) for ids in encode([*parts, *of_special_words], tokenizer)) <= 64
    expected = inference.class_probabilities(model, tokenizer, parts, settings()).mean(0)
    found = inference.class_probabilities(model, tokenizer, [long, "Acme won"], settings())
    assert np.allclose(found[0], expected, atol=1e-6)
    assert "".join(inference.windows("x" * 500, tokenizer, 64)) == "x" * 500


def test_the_control_forgets_the_checkpoint_and_nothing_else(base):
    """A control that keeps the pre-trained weights, or differs in shape, measures something else than pre-training."""
    pretrained, again = (finetuned_checkpoints.load_base("classification", base, settings()) for _ in range(2))
    control = finetuned_checkpoints.load_base("classification", base, settings(), random_init=True)
    assert all(torch.equal(a, b) for a, b in zip(pretrained.parameters(), again.parameters(), strict=True))  # the head comes from the seed
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (pretrained, control)]
    assert shapes[0] == shapes[1]
    name = "transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(pretrained.get_parameter(name), T5ForConditionalGeneration.from_pretrained(base).get_parameter(name[12:]))
    assert not torch.equal(pretrained.get_parameter(name), control.get_parameter(name))


def test_interrupted_fine_tuning_ends_as_if_it_had_not_been(base, tmp_path, monkeypatch):
    """A resumed run that repeats or skips steps gives another model; adapters and head must both come back."""
    chosen, whole = settings("qlora"), finetuning.finetune("classification", base, SPLITS, settings("qlora"), tmp_path / "whole")
    scores, calls = finetuning.validation_scores, []

    def interrupt(predictions):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scores(predictions)

    monkeypatch.setattr(finetuning, "validation_scores", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune("classification", base, SPLITS, chosen, tmp_path / "cut")
    monkeypatch.setattr(finetuning, "validation_scores", scores)
    resumed = finetuning.finetune("classification", base, SPLITS, chosen, tmp_path / "cut")
    expected = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    found = {name: p for name, p in resumed.model.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [r["step"] for r in resumed.log] == [r["step"] for r in whole.log]
    other = {**SPLITS, "validation": SPLITS["validation"].iloc[:15]}
    changed = finetuning.finetune("classification", base, other, chosen, tmp_path / "cut")
    losses = [[record["validation_loss"] for record in run.log if "validation_loss" in record] for run in (whole, changed)]
    assert losses[0] != losses[1]  # the finished run was not taken for this one, which has other validation rows


def test_what_cannot_be_fine_tuned_is_said_in_one_line(base, tmp_path):
    """Each would otherwise fail deep inside, or train on nonsense."""
    two = {**SPLITS, "train": SPLITS["train"][SPLITS["train"]["label"] != 1]}
    with pytest.raises(LabelError, match=r"hold no neutral text: give more labelled rows, every label needs one$"):
        finetuning.finetune("classification", base, two, settings(), tmp_path)
    smaller = T5ForConditionalGeneration.from_pretrained(base)
    smaller.resize_token_embeddings(200, mean_resizing=False)
    smaller.save_pretrained(tmp_path / "smaller")
    finetuned_checkpoints.load_tokenizer(base).save_pretrained(tmp_path / "smaller")
    with pytest.raises(FinetuningError, match=r"tokenizer knows 500 tokens, its model 200: they are of two checkpoints"):
        finetuning.finetune("classification", tmp_path / "smaller", SPLITS, settings(), tmp_path)
    with pytest.raises(FinetuningError, match="not a checkpoint"):
        finetuned_checkpoints.load_base("classification", tmp_path, settings())
    with pytest.raises(FinetuningError, match="not a fine-tuned model"):
        finetuned_checkpoints.load_finetuned(base, base, settings())
    for task in ("classification", "text_to_text"):
        finetuned_checkpoints.load_base(task, base, settings()).save_pretrained(tmp_path / task)
    with pytest.raises(FinetuningError, match="is fine-tuned, its head has seen labels: name the pre-trained checkpoint"):
        finetuned_checkpoints.load_base("classification", tmp_path / "classification", settings())
    with pytest.raises(FinetuningError, match=r"lacks decoder\.block\.0\S+: name the folder of a whole T5 checkpoint"):
        finetuned_checkpoints.load_base("text_to_text", tmp_path / "classification", settings())


def test_full_checkpoint_without_its_head_or_with_other_labels_is_refused(base, tmp_path):
    """A missing head would be drawn at random; other labels would be read as ours."""
    T5ForConditionalGeneration.from_pretrained(base).save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    ours = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}, "num_labels": 3}
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config | ours))
    with pytest.raises(FinetuningError, match=r"has no head, fine-tune again$"):
        finetuned_checkpoints.load_full("classification", tmp_path / "headless")
    other = {"id2label": {0: "negative", 1: "positive", 2: "mixed"}, "label2id": {"negative": 0, "positive": 1, "mixed": 2}}
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config | other))
    with pytest.raises(FinetuningError, match=r"knows the labels negative, positive, mixed, not .*: fine-tune again$"):
        finetuned_checkpoints.load_full("classification", tmp_path / "headless")
    (tmp_path / "headless" / "inference.json").write_text(json.dumps({"labels": LABELS[::-1]}))
    with pytest.raises(FinetuningError, match="knows the labels bullish, neutral, bearish, not"):
        finetuned_checkpoints.read_about(tmp_path / "headless")
