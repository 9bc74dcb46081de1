"""Adapters on a frozen base: LoRA (arXiv 2106.09685) on 16-bit weights, QLoRA (arXiv 2305.14314) on 4-bit ones.

peft and bitsandbytes do the work; this module chooses the layers, keeps the head and the base's digest with the adapter, and
merges. The trade-off, said plainly: at 60M parameters and below 4 bits save little, since the embeddings are not quantised;
what is saved is the optimizer's state and the size of what is stored per task.
"""

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from src.config import FinetuningSettings
from src.verified_folders import file_sha256

BASE_FILE = "base.json"  # which base an adapter belongs to
MEBIBYTE = 1 << 20


class QuantisationError(ValueError):
    """4-bit weights are not to be had here."""


class AdapterError(ValueError):
    """An adapter that is incomplete or belongs to another base."""


def require_bitsandbytes() -> None:
    """Raise `QuantisationError` with the cure where bitsandbytes is absent."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise QuantisationError("method qlora needs bitsandbytes: run `pip install bitsandbytes`, or choose method lora")


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer inside the encoder and decoder by full name: attention q, k, v, o and feed-forward wi, wo; no head."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linears.items() if {"encoder", "decoder"} & set(name.split("."))}


def embedding_tables(model: nn.Module) -> list[str]:
    """The stacks' token embeddings by full name; they are one table, whichever stack reads it."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and name.endswith("embed_tokens")]


def block_size(in_features: int) -> int:
    """Weights that share one scale: 64 as in QLoRA, 32 where a row is not made of whole blocks of 64.

    bitsandbytes 0.50 dequantises row by row on CPU and reads wrong scales when a block crosses a row's end.
    """
    for size in (64, 32):
        if in_features % size == 0:
            return size
    raise QuantisationError(f"a linear layer with {in_features} inputs cannot be quantised: make model widths multiples of 32")


def quantise(model: PreTrainedModel, compute_dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Turn the blocks' linear layers into NF4 with double quantisation, in place (arXiv 2305.14314, sections 3 and 4).

    Done on the loaded model rather than while loading, because a T5 class may list `wo` among the layers to keep in
    float32, and quantisation while loading then silently leaves it out.

    Args:
        model: weights in any float type, on the device where they shall stay.
        compute_dtype: what the 4-bit weights are turned into for the matrix product.
    """
    require_bitsandbytes()
    import bitsandbytes as bnb

    for name, linear in block_linears(model).items():
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=compute_dtype, quant_type="nf4"
        )
        weight, size = linear.weight.data, block_size(linear.in_features)  # (out_features, in_features)
        layer.weight = bnb.nn.Params4bit(
            weight.cpu(),
            requires_grad=False,
            blocksize=size,
            compress_statistics=True,
            quant_type="nf4",
            module=layer,
        )
        layer.bias = linear.bias
        # In eval mode the CPU kernel for AVX512-bf16 would repack the weight in place: one path for training and prediction.
        layer.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(weight.device))
    model.is_loaded_in_4bit = True  # peft asks for this
    return model


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """Turn NF4 layers back into ordinary ones holding exactly the values the 4-bit layers compute with, float32, in place."""
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in block_linears(model).items():
        if not is_quantised(layer):
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=layer.weight.device)
        # The layers compute with bf16 copies of the weights; a float32 copy would not be the base the adapter was trained on.
        linear.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype).float()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    model.is_loaded_in_4bit = False
    return model


def is_quantised(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def head_names(model: PreTrainedModel) -> list[str]:
    """Top-level modules besides the transformer itself: the classification head, which is trained and saved whole."""
    return [name for name, _ in model.named_children() if name not in ("shared", "encoder", "decoder", "lm_head", "transformer")]


def add_adapters(model: PreTrainedModel, settings: FinetuningSettings) -> PeftModel:
    """Freeze a model and put a trainable low-rank adapter on every linear layer of its blocks, `wo` included, and on its embeddings.

    W' = W + scale * B A with A (rank, in) random and B (out, rank) zero, so training starts at the base (arXiv 2106.09685, eq. 3);
    scale = alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732), alpha / rank without. The head, if any, is trained in full.
    Encoder and decoder read one table of embeddings, so they share its adapter. In so small a model the table is a large share of the
    weights, and frozen it costs more than the 4 bits do.
    """
    tables = embedding_tables(model)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=[*block_linears(model), *tables],
        modules_to_save=head_names(model) or None,
        bias="none",
    )
    with quiet_peft():
        adapted = get_peft_model(model, config)
    first, *others = (model.get_submodule(name) for name in tables)
    for table in others:
        for part in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            setattr(table, part, getattr(first, part))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small and updated in small steps: 16 bit would lose the steps
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's warnings that it asks transformers for a property by its old name, and that tied embeddings have an adapter,
    which `add_adapters` and `merge` see to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        yield


def base_digest(base_folder: Path) -> str:
    """SHA-256 of a checkpoint's weights: what an adapter belongs to."""
    path = base_folder / SAFE_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{path} is missing: name the folder of a whole checkpoint")
    return file_sha256(path)


def save_adapter(model: PeftModel, folder: Path, base_folder: Path) -> None:
    """Write adapter and head (`adapter_model.safetensors`), their config, and the digest of the base."""
    model.save_pretrained(folder, save_embedding_layers=False)
    quantised = any(is_quantised(module) for module in model.modules())
    (folder / BASE_FILE).write_text(json.dumps({"sha256": base_digest(base_folder), "quantised": quantised}, indent=1))


def read_base(adapter_folder: Path, base_folder: Path) -> dict[str, object]:
    """What `base.json` says, once the base at hand is known to be the one the adapter was trained on.

    Raises:
        AdapterError: no such file, or another base.
    """
    path = adapter_folder / BASE_FILE
    if not path.is_file():
        raise AdapterError(f"{path} is missing: fine-tune again, an adapter alone does not say which base it belongs to")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if (digest := base_digest(base_folder)) != recorded["sha256"]:
        raise AdapterError(
            f"{adapter_folder} belongs to base {recorded['sha256'][:12]}, but {base_folder} is {digest[:12]}: fine-tune again on this base"
        )
    return recorded


def load_adapter(base: PreTrainedModel, adapter_folder: Path, base_folder: Path, compute_dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    """Put a saved adapter and its head on the base it belongs to, quantised first if it was trained so.

    Raises:
        AdapterError: the adapter belongs to another base, or lacks the head that this model needs.
    """
    if read_base(adapter_folder, base_folder)["quantised"]:
        quantise(base, compute_dtype)
    return attach(base, adapter_folder)


def attach(base: PreTrainedModel, adapter_folder: Path) -> PeftModel:
    saved = json.loads((adapter_folder / "adapter_config.json").read_text(encoding="utf-8"))["modules_to_save"] or []
    lacking = set(head_names(base)) - set(saved)
    if lacking:
        raise AdapterError(f"{adapter_folder} holds no {sorted(lacking)[0]}: it was not trained as a classifier, fine-tune it as one")
    with quiet_peft():
        return PeftModel.from_pretrained(base, adapter_folder).eval()


def merge_to_16_bit(
    base: PreTrainedModel,
    adapter_folder: Path,
    base_folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """One ordinary 16-bit model that predicts what base and adapter predict together.

    The adapter learnt to correct the *quantised* weights, so it is merged onto those, dequantised, in float32, and rounded
    once: merging onto the original weights would give another model.

    Args:
        base: the checkpoint in `base_folder`, freshly loaded; used up.
    """
    if read_base(adapter_folder, base_folder)["quantised"]:
        dequantise(quantise(base, compute_dtype))
    return merge(attach(base.float(), adapter_folder)).to(dtype)


def merge(model: PeftModel) -> PreTrainedModel:
    """The base with its adapters added to its weights; used up. The output layer has no adapter: one that is tied gets its own weights."""
    base = model.get_base_model()
    table, head = base.get_input_embeddings().weight, getattr(base, "lm_head", None)
    if head is not None and head.weight is table:
        head.weight = nn.Parameter(table.detach() * base.logit_scale)  # an output layer of its own is read without T5's scale
        base.logit_scale, base.config.scale_decoder_outputs, base.config.tie_word_embeddings = 1.0, False, False
    for module in base.modules():
        if isinstance(module, nn.Embedding) and module.weight is table:  # or each stack would add the adapter to the one table
            module.weight = nn.Parameter(table.detach().clone())
    with quiet_peft():
        merged = model.merge_and_unload()
    merged.set_input_embeddings(merged.get_submodule(embedding_tables(merged)[0]))
    return merged


def parameter_table(model: nn.Module, optimizer_bytes: int = 8) -> pd.DataFrame:
    """Parameters and memory by part, in training: columns `part`, `parameters`, `trainable`, `mebibytes`.

    Args:
        optimizer_bytes: state per trainable parameter, `src.optimizers.STATE_BYTES`: 8 for AdamW in float32.
    """
    sizes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if "original_module" in name:
            continue  # peft keeps the untrained head beside the trained one
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()  # two 4-bit weights lie in one byte
        size = parameter.numel() * parameter.element_size() + (quant_state_bytes(state) if state is not None else 0)
        total = sizes.setdefault(part_of(name, parameter), [0, 0, 0])
        for index, value in enumerate((count, count * parameter.requires_grad, size)):
            total[index] += value
    trained = sum(trainable for _, trainable, _ in sizes.values())
    sizes["gradients"], sizes["optimizer state"] = [0, 0, 4 * trained], [0, 0, optimizer_bytes * trained]
    rows = [(part, count, trainable, size / MEBIBYTE) for part, (count, trainable, size) in sizes.items()]
    return pd.DataFrame(rows, columns=["part", "parameters", "trainable", "mebibytes"])


def quant_state_bytes(state: object) -> int:
    """Bytes of the scales of one NF4 weight and of the scales' own scales."""
    tensors = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def part_of(name: str, parameter: nn.Parameter) -> str:
    if "lora_" in name:
        return "adapters"
    if "modules_to_save" in name:
        return "head"
    if getattr(parameter, "quant_state", None) is not None:
        return "4-bit linear layers"
    bits = parameter.element_size() * 8
    is_linear = parameter.dim() == 2 and not any(table in name for table in ("shared", "embed", "relative_attention_bias"))
    return f"{bits}-bit linear layers" if is_linear else f"{bits}-bit embeddings, norms"
