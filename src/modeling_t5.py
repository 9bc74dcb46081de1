"""T5 that runs packed rows and slim caches, and is a stock `transformers` T5 on disk.

Stock T5 hands one attention mask to encoder and cross-attention, so it cannot take packed rows; these classes take segment ids
and build the three masks from them. Parameter names, config and `generate` are stock's. Slim caches and packing are ways of
running a checkpoint, never another format.
"""

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqSequenceClassifierOutput

from src.attention import SegmentError, SegmentMask, at_least_float32
from src.config import POOLINGS
from src.fused_loss import linear_cross_entropy
from src.input_checks import (
    ModelError,
    check_cache,
    check_class_labels,
    check_mask,
    check_options,
    check_segments,
    check_sides,
    check_target,
)
from src.packing import IGNORED
from src.slim_generation import SlimGenerationMixin
from src.t5_layers import compute_dtype
from src.t5_stack import TIED_WEIGHTS, T5Model, T5PreTrainedModel, build_stacks


def shift_right(labels: Tensor, segment_ids: Tensor | None, start_id: int, pad_id: int) -> Tensor:
    """Decoder inputs: the labels one to the right, each example beginning with `start_id`.

    `labels [3, 8, 1, 9, 1]` with segments `[1, 1, 1, 2, 2]` gives `[0, 3, 8, 0, 9]`.
    """
    shifted = torch.cat([torch.full_like(labels[:, :1], start_id), labels[:, :-1]], dim=1)
    if segment_ids is not None:
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        shifted = shifted.masked_fill(begins, start_id)
    return shifted.masked_fill(shifted == IGNORED, pad_id)


def mean_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Cross-entropy over labels that are not -100, divided by their number or by `num_items` (of the global batch)."""
    total = nn.functional.cross_entropy(at_least_float32(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum() if num_items is None else num_items
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


class T5ForConditionalGeneration(SlimGenerationMixin, T5PreTrainedModel):
    """T5 with its language modelling head (arXiv 1910.10683); loads and saves stock checkpoints."""

    _tied_weights_keys = TIED_WEIGHTS

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        build_stacks(self, config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # v1.0 scales before the tied head; a v1.1 checkpoint has a head of its own, and its config says so.
        self.logit_scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", config.tie_word_embeddings) else 1.0
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor, decoder_segment_ids: Tensor | None = None) -> Tensor:
        """Decoder inputs for `labels` (batch, length), shifted inside each segment."""
        return shift_right(labels, decoder_segment_ids, self.config.decoder_start_token_id or 0, self.config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values=None,
        num_items_in_batch: Tensor | int | None = None,
        output_logits: bool | None = None,
        use_cache: bool | None = None,
        **options: object,
    ) -> Seq2SeqLMOutput:
        """Logits and loss of a padded or a packed batch.

        Args:
            input_ids: (batch, source) int64.
            attention_mask: (batch, source) 1 = real token; for batches without segments.
            decoder_input_ids: (batch, target); made from `labels` when absent.
            decoder_attention_mask: (batch, target), rarely needed: the decoder is causal.
            labels: (batch, target), -100 = ignored.
            encoder_segment_ids, decoder_segment_ids: (batch, source), (batch, target): 0 = padding, 1.. = example of a packed row.
            encoder_outputs: what `self.encoder` returned, in place of `input_ids`.
            past_key_values: `src.kv_cache.T5Cache`; `decoder_input_ids` then holds the new tokens only. With a cache nothing has a
                gradient: what a slim one multiplies by is made once.
            num_items_in_batch: label tokens of the global batch, which the summed loss is divided by; None: of this one.
            output_logits: False: with labels, return the loss alone, which saves the logits' memory. None: False in training.
            use_cache: True: without labels and `past_key_values`, begin a cache and return it.

        Returns:
            `loss` (scalar, if labels), `logits` (batch, target, vocab_size), `encoder_last_hidden_state`, `past_key_values`.

        Raises:
            ModelError: ids outside the vocabulary, neither labels nor decoder inputs, or an option of stock T5 that is not supported.
            SegmentError: segment ids that do not fit. CacheError: a cache of another kind.
        """
        check_options(options)
        check_target(labels, decoder_input_ids, self.config.vocab_size)
        check_segments(encoder_segment_ids, input_ids if encoder_outputs is None else encoder_outputs[0][..., 0], "encoder_segment_ids")
        check_segments(decoder_segment_ids, labels if decoder_input_ids is None else decoder_input_ids, "decoder_segment_ids")
        check_sides(encoder_segment_ids, decoder_segment_ids)
        if use_cache and past_key_values is None and labels is None:
            past_key_values = self.new_cache()
        check_cache(past_key_values, packed=not encoder_segment_ids is decoder_segment_ids is None)
        loss_only = labels is not None and (self.training if output_logits is None else not output_logits)
        loss_only = loss_only and type(self.lm_head) is nn.Linear  # an adapter on the head takes the plain way
        if decoder_input_ids is None:
            if labels is None:
                raise ModelError("neither decoder_input_ids nor labels are given: pass labels to train or call generate()")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels, decoder_segment_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and past_key_values is None):
            head = self._prepare_head(loss_only)
            try:
                encoder_states = self._encode(input_ids, attention_mask, encoder_segment_ids, encoder_outputs)
                states = self.decoder(
                    decoder_input_ids,
                    attention_mask=decoder_attention_mask,
                    segment_ids=decoder_segment_ids,
                    encoder_states=encoder_states,
                    encoder_mask=cross_mask(attention_mask, encoder_segment_ids, decoder_segment_ids),
                    cache=past_key_values,
                ).last_hidden_state
            finally:
                self._sparse_lookups(False)
            states = states * self.logit_scale
            if loss_only:
                logits, loss = None, linear_cross_entropy(states, head, labels, num_items_in_batch)
            else:
                logits = self.lm_head(states)  # (batch, target, vocab_size)
                loss = None if labels is None else mean_loss(logits, labels, num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=encoder_states)

    def _prepare_head(self, loss_only: bool) -> Tensor:
        """Choose the layout of the embeddings' gradients, and give the head's weight, for the fused loss in the bf16 that it computes in.

        Where the head is tied, the few embedded rows add to its dense gradient; alone, each lookup would fill a table of zeros. Autograd
        adds them in place only if the dense one comes last, and it ends with what was made first: this cast.
        """
        weight = self.lm_head.weight
        self._sparse_lookups(loss_only and weight.device.type == "cpu")
        return weight.to(torch.bfloat16) if loss_only and compute_dtype(weight) == torch.bfloat16 else weight

    def _sparse_lookups(self, wanted: bool) -> None:
        for stack in (self.encoder, self.decoder):
            if isinstance(stack.embed_tokens, nn.Embedding):
                stack.embed_tokens.sparse = wanted and stack.embed_tokens.weight is self.lm_head.weight

    def _encode(self, input_ids, attention_mask, segment_ids, encoder_outputs) -> Tensor:
        if encoder_outputs is not None:
            check_mask(attention_mask, encoder_outputs[0].shape[:2])
            return encoder_outputs[0]
        if input_ids is None:
            raise ModelError("neither input_ids nor encoder_outputs are given: pass the tokens of the source")
        check_mask(attention_mask, input_ids.shape)
        return self.encoder(input_ids, attention_mask=attention_mask, segment_ids=segment_ids).last_hidden_state


def cross_mask(
    attention_mask: Tensor | None, encoder_segments: Tensor | None, decoder_segments: Tensor | None
) -> Tensor | SegmentMask | None:
    """Which source token each target token may see: segments, or bool (batch, 1, 1, source); None: all."""
    if (encoder_segments is None) != (decoder_segments is None):
        missing = "decoder_segment_ids" if decoder_segments is None else "encoder_segment_ids"
        raise SegmentError(f"{missing} is missing: a packed row needs segment ids on both sides")
    if encoder_segments is not None:
        return SegmentMask(decoder_segments, encoder_segments)
    return None if attention_mask is None else attention_mask[:, None, None, :].bool()


class T5ClassificationHead(nn.Module):
    """Dense, tanh, projection to the classes, with dropout between, under stock's names."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))


class T5ForSentimentClassification(T5PreTrainedModel):
    """T5 with a classification head over each example of a row.

    `config.pooling` says what the head sees: `decoder_eos`, T5's own (the decoder's state at the end of the text it is fed;
    opens in stock `T5ForSequenceClassification`), or `encoder_mean` (the mean encoder state; there is no decoder, neither in
    memory nor in the checkpoint, and a step costs less than half).
    """

    _keys_to_ignore_on_load_unexpected = (r"^decoder\.", r"^lm_head\.")  # what a language model has and this one may leave out

    def __init__(self, config: T5Config, pooling: str | None = None) -> None:
        super().__init__(config)
        stocks_own = "T5ForSequenceClassification" in (config.architectures or ())
        pooling = pooling or getattr(config, "pooling", "decoder_eos" if stocks_own else "encoder_mean")
        if pooling not in POOLINGS:
            raise ModelError(f"config.pooling is {pooling!r}: choose encoder_mean or decoder_eos")
        config.pooling = pooling
        self.transformer = T5Model(config, has_decoder=pooling == "decoder_eos")
        self.classification_head = T5ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: object,
    ) -> Seq2SeqSequenceClassifierOutput:
        """Class logits of each example.

        Args:
            input_ids: (batch, length), each example ending with eos.
            attention_mask: (batch, length), for one example a row.
            labels: (batch,), or (rows, segments) for packed rows with -100 where a row has fewer examples.
            encoder_segment_ids: (rows, length) 0 = padding, 1.. = example, for packed rows.
            num_items_in_batch: labelled examples of the global batch; None: of this one.

        Returns:
            `logits` (batch, num_labels), or (rows, segments, num_labels) for packed rows; `loss` if labels are given.

        Raises:
            ModelError: ids outside the vocabulary, labels that do not fit, or an option of stock T5 that is not supported.
            SegmentError: segment ids that do not fit.
        """
        check_options(options)
        if input_ids is None:
            raise ModelError("input_ids are not given: pass the tokens")
        check_mask(attention_mask, input_ids.shape)
        check_segments(encoder_segment_ids, input_ids, "encoder_segment_ids")
        packed = encoder_segment_ids is not None
        segments = encoder_segment_ids if packed else torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        check_class_labels(labels, segments, packed, self.config.num_labels)
        count = 1 if not packed else int(segments.max()) if labels is None else labels.shape[1]
        states = self.transformer.encoder(input_ids, segment_ids=segments).last_hidden_state
        pool = self._mean if self.config.pooling == "encoder_mean" else self._last_eos
        logits = self.classification_head(pool(states, input_ids, segments, count).to(self.classification_head.dense.weight.dtype))
        logits = logits if packed else logits.squeeze(1)
        loss = None if labels is None else mean_loss(logits, labels, num_items_in_batch)
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, encoder_last_hidden_state=states)

    def _mean(self, states: Tensor, input_ids: Tensor, segments: Tensor, count: int) -> Tensor:
        """Mean state of each example: (rows, count, d_model)."""
        member = (segments[:, None, :] == torch.arange(1, count + 1, device=segments.device)[:, None]).to(states.dtype)
        return member @ states / member.sum(-1, keepdim=True).clamp(min=1)

    def _last_eos(self, states: Tensor, input_ids: Tensor, segments: Tensor, count: int) -> Tensor:
        """Decoder state at the last eos of each example: (rows, count, d_model)."""
        decoder_inputs = shift_right(input_ids, segments, self.config.decoder_start_token_id or 0, self.config.pad_token_id)
        states = self.transformer.decoder(
            decoder_inputs, segment_ids=segments, encoder_states=states, encoder_mask=SegmentMask(segments, segments)
        ).last_hidden_state
        example = torch.arange(1, count + 1, device=segments.device)[:, None]
        is_end = (segments[:, None, :] == example) & (input_ids == self.config.eos_token_id)[:, None, :]  # (rows, count, length)
        # Asked on a CPU only, as `check_ids` asks: a GPU would have to be waited for.
        if input_ids.device.type == "cpu" and not bool((is_end.any(-1) | (segments[:, None, :] != example).all(-1)).all()):
            raise ModelError("an example has no eos token: tokenize with the end-of-sequence token, decoder_eos reads the state there")
        last = (is_end * torch.arange(1, input_ids.shape[1] + 1, device=segments.device)).argmax(-1)  # (rows, count)
        return states.gather(1, last[..., None].expand(-1, -1, states.shape[-1]))
