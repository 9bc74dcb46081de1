"""Compiled transformer blocks for training: what stands between the matrix products is fused, which saves a tenth of a step on a CPU.

Blocks are compiled rather than the model, because all layers of a stack share one compiled block: seconds, not minutes. Sizes stay
symbolic, so a step with a row less costs no second compilation and a resumed run computes with the same kernels.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from src.gpu_kernels import HAS_TRITON
from src.t5_layers import T5Block


def can_compile(device: torch.device) -> bool:
    """Whether the compiler has what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None
    return HAS_TRITON


@contextmanager
def compiled_blocks(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within the context, each T5 block of the model runs compiled, if that is `wanted` and pays here."""
    blocks = compile_blocks(model) if wanted else []
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def compile_blocks(model: nn.Module) -> list[T5Block]:
    """Let each T5 block of the model run compiled from its next call on; returns those blocks, none where no compiler is found."""
    blocks = [module for module in model.modules() if isinstance(module, T5Block)]
    if blocks and not can_compile(next(model.parameters()).device):
        print("no compiler found (C++ on a CPU, Triton on a GPU): training goes on uncompiled, about a tenth slower")
        return []
    for block in blocks:
        block.compile(dynamic=True)
    return blocks


def uncompiled() -> torch.compiler.set_stance:
    """A context in which compiled blocks run as written, e.g. for an evaluation that is not worth a compilation."""
    return torch.compiler.set_stance("force_eager")
