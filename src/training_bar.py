"""The training loop's progress bar: over the budget, whatever it counts, with step, loss, rate and speed."""

from collections.abc import Mapping
from typing import Any

from src.progress import progress_bar

FORMAT = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"


class TrainingBar:
    """A context manager; `progress` counts from 0 to 1."""

    def __init__(self, progress: float, disable: bool) -> None:
        self.bar = progress_bar(total=1.0, initial=progress, bar_format=FORMAT, disable=disable, ncols=120)

    def __enter__(self) -> "TrainingBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, record: Mapping[str, Any], progress: float) -> None:
        """Show one step's record of the training log."""
        text = f"step {record['step']}, loss {record['loss']:.3f}, lr {record['learning_rate']:.1e}"
        self.bar.set_postfix_str(f"{text}, {record['tokens_per_second']:,.0f} tokens/s", refresh=False)
        self.bar.update(progress - self.bar.n)
