"""Colours and frames that every picture and table of the notebooks shares."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, ACCENT, MUTED, GRID = "#22303c", "#c2410c", "#8a97a3", "#e3e7eb"
LEFT = [
    {"selector": "th, td", "props": "text-align: left; vertical-align: top"},
    {"selector": "caption", "props": "text-align: left; font-weight: bold; padding: 4px 0; white-space: nowrap"},
]


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
