"""Where our Triton kernels run (`src.triton_attention`, `src.triton_loss`); elsewhere the framework's operations do."""

import importlib.util
import os
import shutil

import torch

# Triton builds its launcher with a C compiler, which an image made to run programs only may lack.
HAS_C_COMPILER = any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang"))
HAS_TRITON = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None and HAS_C_COMPILER
OLDEST_GPU = (8, 0)  # Ampere: the kernels were not tried on what came before


def has_gpu_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they run on this device in this number format, one of 16 bits."""
    on_gpu = HAS_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_GPU
    return on_gpu and dtype in (torch.bfloat16, torch.float16)
