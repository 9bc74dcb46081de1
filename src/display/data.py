"""Tables and pictures of the data notebooks: counts, lengths, classes, frequent words and pieces, texts and their changes.

Texts are escaped and shortened: a table shows what they look like and keeps a notebook small.
"""

import difflib
import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from transformers import PreTrainedTokenizerBase

from src.artifacts import Artifact
from src.cleaning import RULES
from src.display.style import ACCENT, INK, MUTED, Table, finished, plain_axes
from src.labels import LABELS

LABEL_COLOURS = {"bearish": "#b42318", "neutral": "#8a97a3", "bullish": "#15803d"}
PIECE_COLOURS = ("#fde8d7", "#dbeafe", "#dcfce7", "#fef3c7", "#ede9fe")
TEXT_STYLE = {"text-align": "left", "white-space": "pre-wrap", "vertical-align": "top", "max-width": "64em"}


def shortened(text: str, characters: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= characters else f"{text[: characters * 2 // 3]} […] {text[-(characters // 3) :]}"


def table(frame: pd.DataFrame, caption: str | None = None, texts: Sequence[str] = (), decimals: int = 2) -> Table:
    """A frame as the notebooks show it: no index, texts wrapped and escaped, thousands separated."""
    style = Table(frame).hide(axis="index").format(escape="html", thousands=",", precision=decimals, na_rep="")
    if texts:
        style = style.set_properties(subset=list(texts), **TEXT_STYLE)
    return style.set_caption(html.escape(caption)) if caption else style


def sources_table(sources: Sequence[Mapping[str, object]]) -> Table:
    """What was read, as `describe_source` says it, without the files' times."""
    return table(pd.DataFrame(sources).drop(columns="modified_ns", errors="ignore"), "What is read")


def artifacts_table(artifacts: Sequence[Artifact], caption: str | None = None) -> Table:
    """What a notebook leaves on disk: folder, size and the digest that names its content."""
    sizes = [sum(file["bytes"] for file in artifact.manifest["files"].values()) / 1e6 for artifact in artifacts]
    columns = {"artifact": [artifact.name for artifact in artifacts], "folder": [str(artifact.path) for artifact in artifacts]}
    return table(pd.DataFrame(columns | {"MB": sizes, "digest": [artifact.digest[:12] for artifact in artifacts]}), caption)


def with_bars(style: Table, column: str) -> Table:
    """Bars behind a column of percentages."""
    return style.bar(subset=[column], color="#f3c9b0", vmin=0, vmax=100, align="left")


def counts_table(counts: Mapping[str, int], caption: str | None = None, unit: str = "documents") -> Table:
    """Counts at each step, in order, with their share of the first."""
    whole = max(next(iter(counts.values()), 0), 1)
    frame = pd.DataFrame({"step": counts.keys(), unit: counts.values(), "%": [100 * count / whole for count in counts.values()]})
    return with_bars(table(frame, caption, decimals=1), "%")


def rules_table(rules: Mapping[str, Mapping[str, int]], documents: int, caption: str | None = None) -> Table:
    """What each cleaning rule changed: `{rule: {"texts": …, "characters": …}}`, as `report.json` holds it."""
    rows = [
        {
            "rule": name,
            "what it does": RULES[name].description,
            "texts changed": n["texts"],
            "% of texts": 100 * n["texts"] / max(documents, 1),
        }
        | {"characters removed": n["characters"]}
        for name, n in sorted(rules.items(), key=lambda item: list(RULES).index(item[0]))
    ]
    columns = ["rule", "what it does", "texts changed", "% of texts", "characters removed"]
    return with_bars(table(pd.DataFrame(rows, columns=columns), caption, decimals=1), "% of texts")


def examples_table(rows: Iterable[Mapping[str, object]] | pd.DataFrame, caption: str | None = None, characters: int = 400) -> Table:
    """Rows of examples; texts are shortened to `characters`."""
    frame = pd.DataFrame(rows).copy()
    texts = [column for column in frame if pd.api.types.is_string_dtype(frame[column])]
    for column in texts:
        frame[column] = [shortened(str(text), characters) for text in frame[column]]
    return table(frame, caption, texts)


def marked_changes(before: str, after: str, characters: int = 600) -> str:
    """HTML of a text with what was taken out struck through and what was put in underlined; long equal parts shortened."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(html.escape(shortened("".join(old[i:j]), characters)))
            continue
        if removed := "".join(old[i:j]):
            shown = shortened(removed.replace("\n", "⏎\n"), characters)
            parts.append(f'<del style="background:#fde2e1;color:#7a271a">{html.escape(shown)}</del>')
        if added := "".join(new[k:m]):
            parts.append(f'<ins style="background:#dcfce7;color:#14532d">{html.escape(shortened(added, characters))}</ins>')
    return "".join(parts)


def changes_table(pairs: Iterable[tuple[str, str, str]], caption: str = "", characters: int = 240) -> HTML:
    """`(name, before, after)` of each example with the changes marked: struck through is gone, underlined is new."""
    rows = "".join(
        f'<tr><td style="text-align:left;vertical-align:top">{html.escape(name)}</td>'
        f'<td style="text-align:left;white-space:pre-wrap;max-width:72em">{marked_changes(before, after, characters)}</td></tr>'
        for name, before, after in pairs
    )
    return HTML(f'<table><caption style="text-align:left;font-weight:bold;padding:4px 0">{html.escape(caption)}</caption>{rows}</table>')


def thousands(value: float, _: int = 0) -> str:
    return f"{value:,.0f}"


def length_histogram(lengths: Mapping[str, Sequence[int]], unit: str = "tokens", title: str = "", mark: int | None = None) -> Figure:
    """Shares of text lengths on a logarithmic axis, one outline for each name; `mark` draws a line, e.g. at the row length."""
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    everything = np.concatenate([np.asarray(values, np.int64) for values in lengths.values()])
    first, last = (max(1, int(edge(everything))) for edge in (np.min, np.max)) if len(everything) else (1, 1)
    widths = np.maximum(np.diff(np.geomspace(first, last + 1, 41)).round(), 1)  # of whole lengths, never fewer than further left
    edges = first + np.concatenate([[0], np.cumsum(widths)])
    edges = edges[: np.searchsorted(edges, last, "right") + 1]
    for (name, values), colour in zip(lengths.items(), (INK, ACCENT, MUTED), strict=False):
        values = np.maximum(np.asarray(values), 1)
        weights = np.full(len(values), 100 / max(len(values), 1))
        label = f"{name}: {len(values):,}, median {np.median(values):,.0f}" if len(values) else f"{name}: none"
        axes.hist(values, edges, weights=weights, histtype="stepfilled", alpha=0.15, color=colour)
        axes.hist(values, edges, weights=weights, histtype="step", color=colour, linewidth=1.4, label=label)
    if mark:
        axes.axvline(mark, color=ACCENT, linestyle="--", linewidth=1, label=f"{mark:,} {unit}")
    axes.set(xscale="log", xlabel=unit, ylabel="% of texts", title=title)
    ticks = (1, 2, 5) if last > 10 * first else (1, 1.5, 2, 3, 4, 5, 7)
    axes.xaxis.set(major_locator=LogLocator(subs=ticks), major_formatter=FuncFormatter(thousands), minor_formatter="")
    plain_axes(axes).legend(frameon=False, fontsize=9)
    return finished(figure)


def class_balance(labels: Mapping[str, Iterable[int]], title: str = "") -> Figure:
    """Share of each class, one bar for each name (a split, a source), with counts written in it."""
    figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.5 * len(labels)))
    for row, values in enumerate(labels.values()):
        counts = np.bincount(np.asarray(list(values), np.int64), minlength=len(LABELS))
        left = 0.0
        for name, count in zip(LABELS, counts, strict=True):
            share = 100 * count / max(counts.sum(), 1)
            axes.barh(row, share, left=left, color=LABEL_COLOURS[name], height=0.7, label=name if row == 0 else None)
            if share > 6:
                axes.text(left + share / 2, row, f"{count:,}", ha="center", va="center", color="white", fontsize=9)
            left += share
    axes.set(yticks=range(len(labels)), yticklabels=labels.keys(), xlim=(0, 100), xlabel="% of texts", title=title)
    axes.invert_yaxis()
    plain_axes(axes).legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return finished(figure)


def frequency_table(counts: Mapping[str, int], unit: str, columns: int = 4, rows: int = 12, caption: str | None = None) -> Table:
    """The most frequent entries, read down each column in turn."""
    ranked = Counter(counts).most_common(columns * rows)
    frame = pd.DataFrame(index=range(min(rows, len(ranked))))
    for column in range(-(-len(ranked) // rows)):
        part = ranked[column * rows : (column + 1) * rows]
        frame[unit + " " * column] = pd.Series([name for name, _ in part], dtype=object)
        frame["count" + " " * column] = pd.Series([f"{count:,}" for _, count in part], dtype=object)
    return table(frame.fillna(""), caption)


def frequent_words(texts: Iterable[str], shortest: int = 4, **options: object) -> Table:
    """The most frequent words of at least `shortest` letters, lower-cased."""
    word = re.compile(rf"[^\W\d_]{{{shortest},}}")
    counts = Counter(chain.from_iterable(word.findall(text.lower()) for text in texts))
    return frequency_table(counts, "word", **options)


def frequent_pieces(token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, **options: object) -> Table:
    """The most frequent pieces of some token ids (integers of any shape)."""
    counts = np.bincount(np.ravel(token_ids), minlength=len(tokenizer))
    top = np.argsort(-counts, kind="stable")[:100]
    names = tokenizer.convert_ids_to_tokens(top.tolist())
    return frequency_table({name: int(count) for name, count in zip(names, counts[top], strict=True) if count}, "piece", **options)


def pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> HTML:
    """A text cut into the tokenizer's pieces, coloured in turn; ▁ is a space."""
    names = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
    spans = "<wbr>".join(
        f'<span style="background:{PIECE_COLOURS[i % len(PIECE_COLOURS)]};color:#22303c;padding:1px 2px">{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return HTML(f'<div style="line-height:1.9">{spans}</div><div>{len(names):,} pieces, {len(text.split()):,} words</div>')
