"""T5's encoder and decoder stacks, their initialisation, and what a checkpoint must hold to be loaded."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, T5Config
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from src.attention import SegmentMask, at_least_float32, causal_mask, position_bias
from src.dropout import dropout
from src.fast_attention import prepared_bias, prepared_mask
from src.input_checks import ModelError, check_ids, check_options
from src.t5_layers import T5Attention, T5Block, T5FeedForward, T5LayerNorm, compute_dtype

HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
TIED_WEIGHTS = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight")


class T5PreTrainedModel(PreTrainedModel):
    """Initialisation and checkpoint rules shared by all T5 classes here."""

    config_class = T5Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flex_attn = True  # src.fast_attention chooses the kernel by device, whatever the config asks for
    _no_split_modules = ("T5Block",)
    # An early release of the original checkpoints carried this unused table.
    _keys_to_ignore_on_load_unexpected = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as for stock's own models: in custom code transformers skips every module that has no parameter of its own, so
        attention, feed-forward, head and shared embedding would silently keep PyTorch's default initialisation."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """T5's factors: each weight keeps the variance of its input, and q also takes up the missing 1/sqrt(d_kv)."""
        factor, d_model = self.config.initializer_factor, self.config.d_model
        if isinstance(module, T5LayerNorm):
            init.constant_(module.weight, factor)
        elif isinstance(module, T5Attention):
            inner = self.config.num_heads * self.config.d_kv
            scales = {"q": (d_model * self.config.d_kv) ** -0.5, "k": d_model**-0.5, "v": d_model**-0.5, "o": inner**-0.5}
            for name, scale in scales.items():
                init.normal_(getattr(module, name).weight, std=factor * scale)
            if hasattr(module, "relative_attention_bias"):
                init.normal_(module.relative_attention_bias.weight, std=factor * d_model**-0.5)
        elif isinstance(module, T5FeedForward):
            for name, projection in module.named_children():
                if isinstance(projection, nn.Linear):
                    init.normal_(projection.weight, std=factor * (self.config.d_ff if name == "wo" else d_model) ** -0.5)
        elif hasattr(module, "out_proj"):  # the classification head, which no pre-trained checkpoint holds
            for projection in (module.dense, module.out_proj):
                init.normal_(projection.weight, std=factor * d_model**-0.5)
                init.zeros_(projection.bias)
        elif hasattr(module, "shared"):
            init.normal_(module.shared.weight, std=factor)

    def get_input_embeddings(self) -> nn.Embedding:
        """The one table that all stacks read."""
        return getattr(self, self.base_model_prefix, self).shared

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        owner = getattr(self, self.base_model_prefix, self)
        owner.shared = owner.encoder.embed_tokens = new_embeddings
        if hasattr(owner, "decoder"):
            owner.decoder.embed_tokens = new_embeddings

    def set_attention_kernel(self, kernel: str) -> None:
        """Attend with `"plain"`, the readable reference, or `"auto"`, the fastest for the device."""
        for module in self.modules():
            if isinstance(module, T5Attention):
                module.kernel = kernel

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Stock `from_pretrained`, which here refuses checkpoints that are not T5 and weights that are not numbers."""
        path = pretrained_model_name_or_path
        if path is not None:  # else config and weights are given themselves
            config, _ = PreTrainedConfig.get_config_dict(path, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
            if (model_type := config.get("model_type")) != "t5":
                raise ModelError(f"{path} holds a {model_type!r} model: give the folder or Hub id of a T5 checkpoint")
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
                raise ModelError(f"{path}: {name} holds NaN or infinite values: the training run diverged, load an earlier checkpoint")
        return loaded


class T5Stack(T5PreTrainedModel):
    """Encoder or decoder: embedding, blocks, final norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.block = nn.ModuleList([T5Block(config, index) for index in range(config.num_layers)])
        self.final_layer_norm = T5LayerNorm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embed_tokens = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | SegmentMask | None = None,
        cache=None,
        **options: object,
    ) -> BaseModelOutput:
        """Run the stack.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, keys) 1 = real, or None; keys count cached tokens too.
            segment_ids: (batch, length) 0 = padding, 1.. = example, or None; takes the place of `attention_mask`.
            encoder_states: (batch, source length, d_model), decoder only.
            encoder_mask: bool, broadcastable to (batch, 1, length, source length), or the segments of both sides.
            cache: `src.kv_cache.T5Cache` to read and extend, decoder only.

        Returns:
            `last_hidden_state` (batch, length, d_model), normed.
        """
        check_options(options)
        if input_ids is None or not input_ids.numel():
            raise ModelError("input_ids are not given, or empty: pass the tokens")
        check_ids(input_ids, len(self.embed_tokens.weight), "decoder_input_ids" if self.config.is_decoder else "input_ids")
        start = 0 if cache is None else cache.get_seq_length()
        length = input_ids.shape[1]
        rate, dtype = self.config.dropout_rate, compute_dtype(self.final_layer_norm.weight)
        mask = prepared_mask(self._mask(start, length, attention_mask, segment_ids, input_ids.device), dtype, self.config.d_kv)
        encoder_mask = prepared_mask(encoder_mask, dtype, self.config.d_kv)
        bias = prepared_bias(self._bias(start, length, cache), dtype)
        if isinstance(mask, Tensor) and mask.shape[-1] < bias.shape[-1]:  # a cache's room for tokens to come, which the bias masks
            mask = nn.functional.pad(mask, (0, bias.shape[-1] - mask.shape[-1]))
        hidden_states = dropout(at_least_float32(self.embed_tokens(input_ids)), rate, self.training)
        for block in self.block:
            # By position: reentrant checkpointing detaches no keyword, and would walk the shared bias's graph once a block.
            hidden_states = block(hidden_states, bias, mask, encoder_states, encoder_mask, cache)
        return BaseModelOutput(last_hidden_state=dropout(self.final_layer_norm(hidden_states), rate, self.training))

    def _bias(self, start: int, length: int, cache) -> Tensor:
        table, max_distance = self.block[0].layer[0].SelfAttention.relative_attention_bias, self.config.relative_attention_max_distance
        if cache is not None:
            return cache.position_bias(table, start, length, max_distance)
        return position_bias(table, start, length, start + length, not self.config.is_decoder, max_distance)

    def _mask(self, start: int, length: int, attention_mask, segment_ids, device) -> Tensor | SegmentMask | None:
        if segment_ids is not None:
            return SegmentMask(segment_ids, segment_ids, causal=self.config.is_decoder)
        if attention_mask is not None and attention_mask.shape[-1] != start + length:
            raise ModelError(f"the attention mask is for {attention_mask.shape[-1]} tokens, of {start + length}: give each one value")
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        if self.config.is_decoder and length > 1:
            causal = causal_mask(length, start + length, device)
            mask = causal if mask is None else mask & causal
        return mask


class T5Model(T5PreTrainedModel):
    """Encoder, and decoder unless `has_decoder` is False, over one embedding."""

    def __init__(self, config: T5Config, has_decoder: bool = True) -> None:
        super().__init__(config)
        build_stacks(self, config, has_decoder)
        tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")[: 1 + has_decoder]
        self._tied_weights_keys = dict.fromkeys(tied, "shared.weight")
        self.post_init()


def build_stacks(model: PreTrainedModel, config: T5Config, has_decoder: bool = True) -> None:
    """Give a model T5's `shared`, `encoder` and `decoder`."""
    model.shared = nn.Embedding(config.vocab_size, config.d_model)
    encoder_config, decoder_config = copy.deepcopy(config), copy.deepcopy(config)
    encoder_config.is_decoder = encoder_config.use_cache = False
    model.encoder = T5Stack(encoder_config)
    if has_decoder:
        decoder_config.is_decoder, decoder_config.num_layers = True, config.num_decoder_layers
        model.decoder = T5Stack(decoder_config)
