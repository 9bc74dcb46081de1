"""The number formats that training and inference compute in, by their short names: which one is fast here, and its float type."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from src.config import TrainingSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_precision() -> str:
    """The number format that this device computes fast: bf16 where it is native, else fp16 on CUDA, else fp32."""
    if torch.cuda.is_available():
        # A T4 emulates bf16 slowly and still answers True without this flag.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "fp32"


def precision_of(settings: TrainingSettings) -> str:
    """`settings.precision`, with "auto" decided for this device."""
    return best_precision() if settings.precision == "auto" else settings.precision


def precision_dtype(settings: TrainingSettings) -> torch.dtype:
    """The float type that matrix products are computed in."""
    return DTYPES[precision_of(settings)]


def frozen_dtype(settings: TrainingSettings) -> torch.dtype:
    """The float type that frozen weights are kept in. Norms and embeddings compute in it, and float16 would overflow there."""
    return torch.bfloat16 if precision_dtype(settings) == torch.bfloat16 else torch.float32


def autocast(model: nn.Module, settings: TrainingSettings) -> AbstractContextManager:
    """A context in which the model computes its matrix products in that format; what is added up stays float32."""
    dtype = precision_dtype(settings)
    return nullcontext() if dtype == torch.float32 else torch.autocast(next(model.parameters()).device.type, dtype)
