"""Set before any test imports PyTorch or Triton: how many cores a test may use, and whether Triton's kernels are compiled."""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # side by side, each test and the processes it starts have their share
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # decided when Triton is imported
