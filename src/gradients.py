"""The gradient of one optimizer step, however many micro-batches and processes it takes, in the number format of the device.

bf16 where the device computes it natively, fp16 with a gradient scaler on older GPUs, float32 otherwise; weights and
the residual stream stay float32 in all of them. A step that runs out of memory is taken again in smaller pieces.
"""

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from src.collators import PackedEpoch
from src.config import TrainingSettings
from src.cuda_graphs import RecordedPass, can_record
from src.packing import IGNORED
from src.precision import autocast, precision_of


class TrainingError(ValueError):
    """Training cannot go on; says what to change."""


class StepGradients:
    """Computes gradients into `model`; knows device, number format, processes and how many rows fit in memory.

    Attributes:
        precision: "fp32", "bf16" or "fp16", decided.
        micro_rows: rows held in memory at once; halved when memory runs out.
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings, tracker_folder: str | None = None) -> None:
        if settings.tracker and importlib.util.find_spec(settings.tracker) is None:
            raise TrainingError(f"tracker {settings.tracker} is not installed: pip install {settings.tracker}, or set tracker to None")
        # "no": the number format is chosen here, and a launcher's `--mixed_precision` would scale gradients a second time.
        # And one step is one step: a launcher's accumulation would divide what is divided by all labels of the step already.
        single = GradientAccumulationPlugin(num_steps=1)
        self.accelerator = Accelerator(
            mixed_precision="no", gradient_accumulation_plugin=single, log_with=settings.tracker, project_dir=tracker_folder
        )
        self.precision = precision_of(settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.model = self.accelerator.prepare_model(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.settings = settings
        self.micro_rows = settings.rows_per_micro_batch
        self.ready: tuple[object, list[dict[str, torch.Tensor]]] = (None, [])
        self.records = settings.cuda_graphs and can_record(self.device, self.accelerator.num_processes)
        self.recorded: RecordedPass | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> AbstractContextManager:
        return autocast(self.model, self.settings)

    def accumulate(self, epoch: PackedEpoch, start: int, stop: int, step: int) -> tuple[torch.Tensor, float]:
        """Gradient of the mean loss over the labels of all rows `start..stop`, summed over micro-batches and processes.

        Returns:
            This process's share of that loss, on the device, and the real tokens it read.

        Raises:
            TrainingError: no memory for one row at a time.
        """
        while True:
            try:
                return self._backward(epoch, start, stop, step)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_rows == 1 or self.accelerator.num_processes > 1:
                    cure = "lower the row lengths" + (" or rows_per_micro_batch" if self.micro_rows > 1 else "")
                    raise TrainingError(f"out of memory with {self.micro_rows} row(s) at a time: {cure}") from error
            self.micro_rows //= 2
            self.recorded = None
            print(f"out of memory: going on with {self.micro_rows} rows at a time, the global batch stays {self.settings.rows_per_step}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward(self, epoch: PackedEpoch, start: int, stop: int, step: int) -> tuple[torch.Tensor, float]:
        self.model.train()
        num_labels = max(1, epoch.num_labels(start, stop))
        batches, weight = self._batches(epoch, start, stop)
        if self.records:
            batches = [padded(batch, self.micro_rows) | {"num_items_in_batch": torch.tensor(num_labels)} for batch in batches]
            self._record(batches[0])
        torch.manual_seed(step_seed(self.settings.seed, step, self.accelerator.process_index))  # dropout
        self._clear()
        total, tokens = torch.zeros((), device=self.device), 0.0
        for number, batch in enumerate(batches, 1):
            tokens += weight * count_tokens(batch)
            if self.recorded is not None:
                total += self.recorded(batch)
                continue
            batch = {key: values.to(self.device, non_blocking=True) for key, values in batch.items()}
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.model):
                total += self._pass(batch | {"num_items_in_batch": num_labels}, weight)
        return total, tokens

    def _record(self, batch: Mapping[str, torch.Tensor]) -> None:
        if self.recorded is None or not self.recorded.takes(batch):
            self.recorded = None  # its memory goes before the next one's comes
            self.recorded = RecordedPass(self._pass, batch)

    def _clear(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.recorded is None:
            self.model.zero_grad(set_to_none=True)
        elif gradients:  # what is recorded adds to these very tensors
            torch._foreach_zero_(gradients)

    def _pass(self, inputs: Mapping[str, torch.Tensor | int], weight: float = 1.0) -> torch.Tensor:
        """Add one micro-batch's gradient; returns its loss, float32."""
        with self.autocast():
            loss = self.model(**inputs).loss * weight
        # Gradients are averaged over processes, and the loss is to be summed.
        self.accelerator.backward(self.scaler.scale(loss * self.accelerator.num_processes))
        return loss.detach().float()

    def _batches(self, epoch: PackedEpoch, start: int, stop: int) -> tuple[list[dict[str, torch.Tensor]], float]:
        """This process's micro-batches, and their weight: 0 where there are more processes than rows, to take part all the same."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        first, last = (start + (stop - start) * share // processes for share in (process, process + 1))
        weight = float(first < last)
        bounds = [(row, min(row + self.micro_rows, last)) for row in range(first, last, self.micro_rows)] or [(start, start + 1)]
        if self.ready[0] != (id(epoch), bounds):
            batches = [epoch.batch(*bound) for bound in bounds]
            if self.device.type == "cuda":  # from pinned memory a copy does not wait for what the GPU is at
                batches = [{key: values.pin_memory() for key, values in batch.items()} for batch in batches]
            self.ready = ((id(epoch), bounds), batches)
        return self.ready[1], weight

    def prepare(self, epoch: PackedEpoch, start: int, stop: int) -> None:
        """Make the next step's batches now, while an accelerator is still busy with this one's."""
        if self.device.type != "cpu":
            self._batches(epoch, start, stop)

    def clip(self) -> torch.Tensor:
        """Norm of the whole gradient before clipping, on the device."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)

    def sum_over_processes(self, *values: float) -> list[float]:
        if self.accelerator.num_processes == 1:
            return list(values)
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum").tolist()


def step_seed(seed: int, step: int, process: int) -> int:
    """Seed of one step's random numbers on one process: nothing to save, nothing to lose."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0] >> 1)


def padded(batch: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """A packed batch of `rows` rows, the last of which hold no example where it has fewer."""
    missing = rows - len(next(iter(batch.values())))
    return {
        key: nn.functional.pad(values, (0, 0, 0, missing), value=IGNORED if key == "labels" else 0) if missing else values
        for key, values in batch.items()
    }


def count_tokens(batch: Mapping[str, torch.Tensor]) -> float:
    """Real tokens on both sides of a batch; all of them where there are no segment ids."""
    segments = [values for key, values in batch.items() if key.endswith("segment_ids")]
    return float(sum(int((values > 0).sum()) for values in segments)) or float(batch["input_ids"].numel())


def is_out_of_memory(error: BaseException) -> bool:
    # Not all of them have a type of their own: on a CPU the words depend on the system, on a GPU on the library that asked.
    words = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in str(error) for part in words)
