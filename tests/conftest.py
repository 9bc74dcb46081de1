"""Set before any test imports PyTorch or Triton: how many cores a test may use, and whether Triton's kernels are compiled.

Property tests have no deadline: on a busy machine it would fail them.
"""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # side by side, each test and the processes it starts have their share
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))

import torch
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # decided when Triton is imported
