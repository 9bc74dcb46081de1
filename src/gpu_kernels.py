"""Where our Triton kernels run (`src.triton_attention`, `src.triton_loss`); elsewhere the framework's operations do."""

import importlib.util

import torch

HAS_TRITON = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
OLDEST_GPU = (8, 0)  # Ampere: the kernels were not tried on what came before


def has_gpu_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they run on this device in this number format, one of 16 bits."""
    on_gpu = HAS_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_GPU
    return on_gpu and dtype in (torch.bfloat16, torch.float16)
