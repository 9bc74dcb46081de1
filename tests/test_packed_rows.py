"""Packed rows against single examples, for both heads."""

import pytest
import torch
import transformers

from src.input_checks import ModelError
from src.modeling_t5 import T5ForConditionalGeneration, T5ForSentimentClassification, shift_right
from tests.small_t5 import SIZES, V10, config_of, packed_row, padded_batch, stock_checkpoint


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
