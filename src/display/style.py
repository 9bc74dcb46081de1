"""Colours and frames that every picture and table of the notebooks shares."""

import css_inline
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

INK, ACCENT, MUTED, GRID = "#22303c", "#c2410c", "#8a97a3", "#e3e7eb"
SHEET = [
    {"selector": "th, td", "props": "text-align: left; vertical-align: top"},
    {"selector": "caption", "props": "text-align: left; font-weight: bold; padding: 4px 0; white-space: nowrap"},
]


class Table(Styler):
    """A frame as HTML, words to the left and numbers to the right. Its style stands in its cells, because Jupyter drops the style sheets
    of a notebook that was run elsewhere."""

    def __init__(self, frame: pd.DataFrame) -> None:
        super().__init__(frame, uuid="table", cell_ids=False)  # the same bytes in every run
        numbers = {column: [{"selector": "", "props": "text-align: right"}] for column in frame.select_dtypes("number")}
        self.set_table_styles(SHEET).set_table_styles(numbers, overwrite=False)

    def __repr__(self) -> str:
        return f"<Table of {len(self.data)} rows>"

    def _repr_html_(self) -> str:
        sheet, _, body = super()._repr_html_().partition("</style>")
        return css_inline.CSSInliner().inline_fragment(body, sheet.partition(">")[2])


def plain_axes(axes: Axes) -> Axes:
    """A quiet frame: no box, a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def finished(figure: Figure) -> Figure:
    """Close the figure for pyplot, so that a notebook shows it once: as the value of its cell."""
    figure.tight_layout()
    plt.close(figure)
    return figure
