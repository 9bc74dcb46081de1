"""The device that benchmarks run on: a GPU where there is one."""

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    (torch.cuda if ON_GPU else torch.cpu).synchronize()
