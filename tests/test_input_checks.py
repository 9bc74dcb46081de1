"""What a user may hand to a model by mistake, and the one line that says so."""

import pytest
import torch
import transformers

from src.attention import SegmentError
from src.input_checks import ModelError
from src.kv_cache import CacheError
from src.modeling_t5 import T5ForConditionalGeneration, T5ForSentimentClassification
from tests.small_t5 import SIZES, V10, config_of, packed_row


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
