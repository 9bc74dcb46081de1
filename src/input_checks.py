"""What a model is given, checked before anything is computed: each error is one line that says what to change."""

from collections.abc import Mapping

from torch import Tensor, aminmax

from src.attention import SegmentError
from src.kv_cache import CacheError, T5Cache
from src.packing import IGNORED


class ModelError(ValueError):
    """Weights, ids or options that a model cannot run with."""


UNSUPPORTED = (  # arguments of stock T5
    "inputs_embeds", "decoder_inputs_embeds", "output_attentions", "output_hidden_states",
    "head_mask", "decoder_head_mask", "cross_attn_head_mask",
)  # fmt: skip


def can_look_at(values: Tensor | None) -> bool:
    """Whether values can be checked: on other devices than the CPU that would cost a synchronisation."""
    return values is not None and values.device.type == "cpu" and values.numel() > 0


def check_ids(ids: Tensor | None, vocab_size: int, name: str) -> None:
    """Refuse ids outside the vocabulary with the reason."""
    if not can_look_at(ids):
        return
    lowest, highest = (int(extreme) for extreme in aminmax(ids.masked_fill(ids == IGNORED, 0) if name == "labels" else ids))
    if lowest < 0 or highest >= vocab_size:
        raise ModelError(
            f"{name} holds id {lowest if lowest < 0 else highest} but the model's vocabulary has {vocab_size}: "
            "use the tokenizer saved with the checkpoint"
        )


def check_mask(mask: Tensor | None, tokens: tuple[int, ...]) -> None:
    """Refuse a mask that is not (batch, source): it would be broadcast, or say nothing of some tokens."""
    if mask is not None and tuple(mask.shape) != tuple(tokens):
        raise ModelError(f"attention_mask is {tuple(mask.shape)} for tokens {tuple(tokens)}: give one value per token")


def check_segments(segment_ids: Tensor | None, ids: Tensor | None, name: str) -> None:
    if segment_ids is not None and ids is not None and segment_ids.shape != ids.shape:
        raise SegmentError(f"{name} is {tuple(segment_ids.shape)} for tokens {tuple(ids.shape)}: give one segment id per token")


def check_sides(encoder_segments: Tensor | None, decoder_segments: Tensor | None) -> None:
    """Refuse a target without a source: with no key to see it would see them all, of every example."""
    if not can_look_at(encoder_segments) or decoder_segments is None or len(encoder_segments) != len(decoder_segments):
        return
    alone = (decoder_segments > 0) & ~(decoder_segments[:, :, None] == encoder_segments[:, None, :]).any(-1)
    if bool(alone.any()):
        row, place = alone.nonzero()[0].tolist()
        raise SegmentError(
            f"row {row} has targets of segment {int(decoder_segments[row, place])} and no source: number an example alike on both sides"
        )


def check_options(options: Mapping[str, object]) -> None:
    """Refuse what stock T5 takes and this model would pass over in silence, and segment ids under another name."""
    for name, value in options.items():
        given = isinstance(value, Tensor) or bool(value)
        if (name in UNSUPPORTED and given) or (name == "return_dict" and value is False):
            raise ModelError(
                f"{name}={'...' if given else value} is not supported here: open the checkpoint with stock transformers for it"
            )
        if "segment" in name and given:
            raise ModelError(f"{name} is unknown: models take encoder_segment_ids and decoder_segment_ids, a stack segment_ids")


def check_target(labels: Tensor | None, decoder_input_ids: Tensor | None, vocab_size: int) -> None:
    """Refuse labels outside the vocabulary, or not one for each decoder input."""
    check_ids(labels, vocab_size, "labels")
    if None not in (labels, decoder_input_ids) and labels.shape != decoder_input_ids.shape:
        raise ModelError(f"labels are {tuple(labels.shape)} and decoder_input_ids {tuple(decoder_input_ids.shape)}: make them the same")


def check_cache(cache: object | None, packed: bool) -> None:
    """Refuse a cache that is not ours, and any for packed rows."""
    if cache is None:
        return
    if not isinstance(cache, T5Cache):
        raise CacheError(f"past_key_values is a {type(cache).__name__}: make one with model.new_cache()")
    if packed:
        raise SegmentError("packed rows cannot be decoded with a cache: leave the segment ids away and give one text a row")


def check_class_labels(labels: Tensor | None, segments: Tensor, packed: bool, num_labels: int) -> None:
    """Refuse labels of a classifier that are not one for each row, or one for each example of a packed row."""
    if labels is None:
        return
    if labels.dim() != 1 + packed or len(labels) != len(segments):
        wanted = f"({len(segments)}, most examples of a row)" if packed else f"({len(segments)},)"
        raise ModelError(f"labels are {tuple(labels.shape)} for {len(segments)} rows: give {wanted}")
    if packed and can_look_at(segments) and int(segments.max()) > labels.shape[1]:
        raise ModelError(f"a row has {int(segments.max())} examples and {labels.shape[1]} labels: give each its label, or -100")
    if can_look_at(labels) and bool(((labels != IGNORED) & ((labels < 0) | (labels >= num_labels))).any()):
        raise ModelError(f"labels must be below {num_labels}, config.num_labels, or -100 to be ignored")
