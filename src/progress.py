"""One progress bar for the whole project: readable in Jupyter, in Colab, in a terminal and in a log.

Widgets look nicer but leave "Error displaying widget" in a saved notebook, so the bar is text; it goes to standard
output because Jupyter paints standard error red.
"""

import sys
from typing import Any

from tqdm.std import tqdm

from src.environment import in_notebook


def is_interactive() -> bool:
    """Whether somebody can watch the bar move: a terminal or a notebook, not a log file."""
    return sys.stdout.isatty() or in_notebook()


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """A `tqdm` with this project's defaults; takes the arguments of `tqdm`."""
    defaults = {"file": sys.stdout, "ncols": 110, "mininterval": 0.5 if is_interactive() else 15.0, "smoothing": 0.1}
    return tqdm(*args, **{**defaults, **kwargs})
