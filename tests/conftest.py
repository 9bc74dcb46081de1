"""Set before any test imports Triton, which decides then whether kernels are compiled or interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
