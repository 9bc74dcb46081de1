"""`generate(..., cache_kind=...)`: which cache decoding keeps, and the proof that a K-cache needs before it is used."""

import warnings

import torch
from torch import Tensor
from transformers import GenerationMixin

from src.kv_cache import DEFAULT_CACHE_KIND, CacheError, T5Cache, parse_cache_kind
from src.slim_attention import effective_weight, key_cache_weight
from src.t5_layers import compute_dtype
from src.t5_stack import T5Stack

CALIBRATION_TOKENS = (8, 128)  # rows, tokens a row


class SlimGenerationMixin(GenerationMixin):
    """`generate` with the caches of src.kv_cache; for models with a T5 `encoder` and `decoder`.

    The kind is the argument `cache_kind`, else `generation_config.cache_kind`, else "x+e".
    """

    decoder: T5Stack
    _key_cache: tuple | None = None  # (fingerprint of the weights, W_KV or None by layer)

    def generate(self, inputs: Tensor | None = None, generation_config=None, *args, cache_kind: str | None = None, **kwargs):
        """Stock `generate` with one more argument, `cache_kind`. Kind `k` is calibrated on the source unless it has been before."""
        configs = (generation_config, self.generation_config)
        cache_kind = cache_kind or next(filter(None, (getattr(c, "cache_kind", None) for c in configs)), DEFAULT_CACHE_KIND)
        if parse_cache_kind(cache_kind)[0] == "k":
            self._calibrated(kwargs.get("input_ids") if inputs is None else inputs)
        return super().generate(inputs, generation_config, *args, cache_kind=cache_kind, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Stock `save_pretrained`; a generation config that names a cache is the user's own, or its reader would drop the name."""
        if hasattr(self.generation_config, "cache_kind"):
            self.generation_config._from_model_config = False
        super().save_pretrained(*args, **kwargs)

    def new_cache(self, kind: str = DEFAULT_CACHE_KIND, capacity: int | None = None, calibration_ids: Tensor | None = None) -> T5Cache:
        """An empty cache for `past_key_values`.

        Args:
            kind: one of `src.kv_cache.CACHE_KINDS`.
            capacity: decoder tokens that will not be exceeded, so that no room is left over; None: not known.
            calibration_ids: (rows, tokens) of real text, read by kind `k` unless `calibrate_key_cache` was called before.

        Raises:
            CacheError: unknown kind, or `k` with nothing to calibrate on.
        """
        key_weights = self._calibrated(calibration_ids) if parse_cache_kind(kind)[0] == "k" else None
        return T5Cache(len(self.decoder.block), kind, capacity, key_weights)

    @torch.no_grad()
    def calibrate_key_cache(self, input_ids: Tensor) -> list[float]:
        """Decide layer by layer whether V = K W_KV is good enough here, on the activations of real text.

        Args:
            input_ids: (rows, tokens) of real text, fed to encoder and decoder.

        Returns:
            the error of each layer as a share of V; layers above the dtype's tolerance will use the X-cache.
        """
        seen = self._attention_inputs(input_ids)
        found = [key_cache_weight(block.layer[0].SelfAttention, states) for block, states in zip(self.decoder.block, seen, strict=True)]
        self._key_cache = (self._fingerprint(), [weight for weight, _ in found])
        refused = {index: f"{error:.1e}" for index, (weight, error) in enumerate(found) if weight is None}
        if refused:
            warnings.warn(
                f"K-cache: V from K is too far off in {seen[0].dtype}, these layers use X (layer: error): {refused}", stacklevel=2
            )
        return [error for _, error in found]

    def _attention_inputs(self, input_ids: Tensor) -> list[Tensor]:
        """Normed self-attention input of each decoder layer, (tokens, d_model), in the dtype attention computes in."""
        rows, tokens = CALIBRATION_TOKENS
        input_ids, seen = input_ids[:rows, :tokens], []
        real = input_ids != self.config.pad_token_id

        def keep(attention, args, kwargs) -> None:
            seen.append(args[0][real].to(attention.q(args[0][:1, :1]).dtype))

        hooks = [block.layer[0].SelfAttention.register_forward_pre_hook(keep, with_kwargs=True) for block in self.decoder.block]
        try:
            self(input_ids=input_ids, attention_mask=real.long(), decoder_input_ids=input_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _calibrated(self, calibration_ids: Tensor | None) -> list[Tensor | None]:
        if self._key_cache is None or self._key_cache[0] != self._fingerprint():
            if calibration_ids is None:
                raise CacheError("the k cache is not calibrated for these weights: call model.calibrate_key_cache(input_ids of real text)")
            self.calibrate_key_cache(calibration_ids)
        return self._key_cache[1]

    def _fingerprint(self) -> tuple:
        """Changes with the weights of k and v, their adapters, and the dtype that products are computed in."""
        dtype = compute_dtype(self.decoder.final_layer_norm.weight)
        attentions = [block.layer[0].SelfAttention for block in self.decoder.block]
        weights = [effective_weight(projection, dtype) for attention in attentions for projection in (attention.k, attention.v)]
        return (dtype, *(float(total) for weight in weights for total in (weight.float().sum(), weight.float().square().sum())))

    def _prepare_generation_config(self, generation_config, *args, cache_kind: str = DEFAULT_CACHE_KIND, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        generation_config.cache_kind = cache_kind
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args) -> None:
        """Build the cache of `generate`, with room for exactly the tokens that it may write."""
        if generation_config.cache_implementation is not None:
            raise CacheError(f"cache_implementation={generation_config.cache_implementation!r} is not for this model: use cache_kind")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache(generation_config.cache_kind, generation_config.max_length - 1)
