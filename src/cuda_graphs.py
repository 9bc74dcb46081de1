"""A training pass recorded as one CUDA graph: a GPU gets a thousand kernels in one launch, where launching each takes longer than it runs.

See "CUDA Graphs" in PyTorch's notes on CUDA semantics. What is recorded are addresses: inputs are copied to where the recording
reads them, and gradients are added to tensors that must stay where they are.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

WARM_UP_PASSES = 3  # compilers and libraries choose and allocate in the first passes, which a recording may not


def can_record(device: torch.device, processes: int) -> bool:
    """Whether passes can be recorded: on one GPU. Gradients shared by processes would have to be sent in the recording, too."""
    return device.type == "cuda" and processes == 1


class RecordedPass:
    """`work(inputs)`, recorded at once and replayed by every call.

    Args:
        work: launches the same kernels whatever the values of its inputs, and never waits for the device. It runs some times here,
            so what it adds to gradients is to be cleared afterwards, in place.
        inputs: tensors by name.
    """

    def __init__(self, work: Callable[[dict[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]) -> None:
        self.inputs = {name: values.to("cuda", copy=True) for name, values in inputs.items()}
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                work(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, stream=stream):
            self.output = work(self.inputs)

    def takes(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether these inputs have the names and shapes that it was recorded with."""
        return {name: values.shape for name, values in inputs.items()} == {name: values.shape for name, values in self.inputs.items()}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What `work` returns for inputs that it `takes`, which may lie on the CPU; the next call overwrites it."""
        for name, values in inputs.items():
            self.inputs[name].copy_(values, non_blocking=True)
        self.graph.replay()
        return self.output
