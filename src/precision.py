"""The number formats that training and inference compute in, by their short names: which one is fast here, and its float type."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import nn

from src.config import TrainingSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_precision() -> str:
    """The number format that this device computes fast: bf16 where it is native, else fp16 on CUDA, else fp32."""
    if torch.cuda.is_available():
        # A T4 emulates bf16 slowly and still answers True without this flag.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_multiplies_bf16_fast(processor()) else "fp32"


@cache
def processor() -> dict[str, str]:
    """What Linux says of the first core, `vendor_id`, `model name`, `flags` and so on; elsewhere nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().partition("\n\n")[0] if cpuinfo.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_multiplies_bf16_fast(cpu: Mapping[str, str]) -> bool:
    """Whether bf16 matrix products beat float32 ones, by what `processor` says.

    Intel's AMX makes them several times as fast, and AMD's AVX-512 multiplies twice as many at once. Intel's AVX-512 has no more
    multipliers for them than for float32: without AMX, as virtual machines often come, a product took 1.6 times as long as in float32,
    and a step of pre-training 1.3 times.
    """
    flags = cpu.get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and cpu.get("vendor_id") == "AuthenticAMD")


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
