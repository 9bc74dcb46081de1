"""Datasets of the Hugging Face Hub: the revision in use, pinned and recorded, and their rows.

The Hub is asked for the revision first, with a deadline of its own: libraries retry for minutes where there is no
network, and a run that cannot start should say so at once.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from src.file_formats import BATCH_ROWS, Row, SourceError

HUB_SECONDS = 6.0
OFFLINE_CURE = "use CORPUS=sample and LABELLED=sample, or the path of a local file or folder"


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Result of a call, or TimeoutError; a call that hangs (even in name resolution) is left behind in a daemon thread."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


@cache
def hub_revision(hub_id: str) -> str:
    """Commit of the dataset's main branch now; asked once a process, so that what is read is what is recorded.

    Raises:
        SourceError: no such dataset, or the Hub cannot be reached within `HUB_SECONDS`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return within(HUB_SECONDS, lambda: HfApi().dataset_info(hub_id, timeout=HUB_SECONDS).sha)
    except (RepositoryNotFoundError, GatedRepoError):
        raise SourceError(f"{hub_id!r} is neither a local file or folder nor an open dataset on the Hub: {OFFLINE_CURE}") from None
    except Exception as error:
        raise SourceError(
            f"{hub_id!r} is no local file or folder, and the Hub cannot be reached ({reason(error)}): {OFFLINE_CURE}"
        ) from None


def reason(error: BaseException) -> str:
    """First line of the innermost cause: `datasets` hides what went wrong in `__cause__`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def load_hub_dataset(hub_id: str, split: str | None) -> Any:
    """The `datasets.Dataset` of one split (None: `train`, or the first), memory-mapped from the local cache."""
    import datasets

    revision = hub_revision(hub_id)
    try:
        splits = datasets.load_dataset(hub_id, revision=revision)
    except Exception as error:
        raise SourceError(f"{hub_id!r} at {revision[:12]} cannot be loaded ({reason(error)}): {OFFLINE_CURE}") from None
    name = split or ("train" if "train" in splits else next(iter(splits)))
    if name not in splits:
        raise SourceError(f"{hub_id!r} has no split {name!r}: choose one of {', '.join(splits)}")
    return splits[name]


def hub_rows(dataset: Any, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a `datasets.Dataset`, read in batches."""
    for batch in dataset.select_columns(list(columns)).iter(batch_size=BATCH_ROWS):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield dict(zip(columns, values, strict=True))
