"""Tables and pictures of stages 4 and 5: scores with their intervals, confusions, calibration, errors.

Every function takes what `src.evaluation` returns and hands back a table or a matplotlib figure; none computes a
score of its own, so a picture cannot disagree with a table.
"""

import html
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from src.baselines import BASELINES
from src.display.style import ACCENT, INK, MUTED, Table, finished, plain_axes
from src.evaluation import COSTS, members_of
from src.labels import LABELS

LABEL_COLOURS = ("#fecaca", "#e5e7eb", "#bbf7d0")  # bearish, neutral, bullish
KINDS = {ACCENT: "pre-trained", INK: "the same T5 from random initialisation", MUTED: "baseline"}  # of models, by `colour_of`
FEWEST_TEXTS = 5  # in a bin of the reliability diagram: the accuracy of fewer says nothing


def colour_of(model: str) -> str:
    """By kind; an average has the colour of the most that it holds."""
    kinds = {MUTED if member in BASELINES else INK if "random_init" in member else ACCENT for member in members_of(model)}
    return next(kind for kind in (ACCENT, INK, MUTED) if kind in kinds)


def best_of_each_kind(ranked: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Of models, best first, the best of each of `KINDS`: few enough to tell their lines apart."""
    best: dict[str, Mapping[str, object]] = {}
    for result in ranked:
        best.setdefault(colour_of(result["model"]), result)
    return list(best.values())


def packed_sentences(batch: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, row: int = 0) -> HTML:
    """One packed row of the classifier: sentences in turn, each on the colour of its label (red bearish, grey neutral, green bullish)."""
    ids, segments, labels = (batch[key][row] for key in ("input_ids", "encoder_segment_ids", "labels"))
    spans = []
    for segment in range(1, int(segments.max()) + 1):
        sentence = html.escape(tokenizer.decode(ids[segments == segment], skip_special_tokens=True))
        style = f"background:{LABEL_COLOURS[labels[segment - 1]]};border-radius:3px;padding:1px 4px"
        spans.append(f'<span style="{style}">{sentence}</span>')
    return HTML(f'<div style="line-height:1.9;max-width:70em">{" ".join(spans)}</div>')


def score_cell(metrics: Mapping[str, object], name: str) -> str:
    low, high = metrics[f"{name}_ci95"]
    return f"{metrics[name]:.3f}  [{low:.3f}, {high:.3f}]"


def scores_table(metrics: Sequence[Mapping[str, object]], *, with_costs: bool = False) -> Table:
    """All models, best macro-F1 first, each score with its 95 % interval.

    Args:
        metrics: results of `evaluate_predictions`; those of fine-tuned models hold `costs`, by the keys of `COSTS`.
        with_costs: show them, in place of MCC and calibration: a page holds no wider table.
    """
    rows = []
    for result in sorted(metrics, key=lambda result: -result["macro_f1"]):
        row = {"model": result["model"], "accuracy": score_cell(result, "accuracy"), "macro-F1": score_cell(result, "macro_f1")}
        cost = result.get("costs", {})
        calibration = {"MCC": result["mcc"], "ECE": result.get("ece"), "ECE, scaled": result.get("ece_scaled")}
        costs = {title: cost.get(key) for key, title in COSTS.items()}
        rows.append(row | {"not a label": result["invalid_rate"]} | (costs if with_costs else calibration))
    formats = {"not a label": "{:.1%}"} | dict.fromkeys((COSTS["seconds"], COSTS["mebibytes"]), "{:.1f}")
    formats = {title: formats.get(title, "{:.3f}") for title in list(rows[0])[3:]}
    table = Table(pd.DataFrame(rows).astype(dict.fromkeys(formats, float))).hide(axis="index").format(formats, na_rep="–")
    return table.set_properties(subset=["accuracy", "macro-F1"], **{"white-space": "nowrap"})


def without_table(metrics: Sequence[Mapping[str, object]], rest: Sequence[Mapping[str, object] | None]) -> Table:
    """Scores on all texts beside those on the rest of them (`src.evaluation.scores_without`), best macro-F1 first."""
    whole = {result["model"]: result for result in metrics}
    rows = [
        {
            "model": result["model"],
            "accuracy, all texts": whole[result["model"]]["accuracy"],
            "accuracy, the rest": result["accuracy"],
            "macro-F1, all texts": whole[result["model"]]["macro_f1"],
            "macro-F1, the rest": result["macro_f1"],
        }
        for result in sorted(filter(None, rest), key=lambda result: -whole[result["model"]]["macro_f1"])
    ]
    return Table(pd.DataFrame(rows)).format(precision=3).hide(axis="index")


def class_table(metrics: Mapping[str, object]) -> Table:
    """Precision, recall and F1 of each class, with its number of texts."""
    frame = pd.DataFrame(metrics["per_class"]).T.astype({"support": int}).rename(columns={"support": "texts"})
    return Table(frame).format("{:.3f}", subset=["precision", "recall", "f1"])


def comparison_table(comparisons: Sequence[Mapping[str, object]]) -> Table:
    """Paired differences: is the first model better than the second on the same texts?"""
    rows = []
    for result in comparisons:
        low, high = result["macro_f1_difference_ci95"]
        row = {"first": result["first"], "second": result["second"], "macro-F1 difference": result["macro_f1_difference"]}
        row |= {"95 % interval": f"[{low:+.3f}, {high:+.3f}]", "accuracy difference": result["accuracy_difference"]}
        rows.append(row | {"bootstrap p, macro-F1": result["bootstrap_p"], "McNemar p": result["mcnemar_p"]})
    formats = {"macro-F1 difference": "{:+.3f}", "accuracy difference": "{:+.3f}", "bootstrap p, macro-F1": "{:.3f}", "McNemar p": "{:.2g}"}
    return Table(pd.DataFrame(rows)).format(formats).hide(axis="index")


def intervals_figure(metrics: Sequence[Mapping[str, object]]) -> Figure:
    """The picture to remember: accuracy and macro-F1 of the models with their 95 % intervals, best at the top.

    The majority class stays in the table: its distance would squeeze the intervals of all others.
    """
    shown = [result for result in metrics if result["model"] != "majority"] or metrics
    ordered = sorted(shown, key=lambda result: result["macro_f1"])
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.42 * len(ordered) + 1.4), sharey=True, layout="constrained")
    for axes, name, label in zip(panels, ("macro_f1", "accuracy"), ("macro-F1", "accuracy"), strict=True):
        plain_axes(axes).grid(axis="y", visible=False)
        for position, result in enumerate(ordered):
            low, high = result[f"{name}_ci95"]
            colour = colour_of(result["model"])
            axes.plot([low, high], [position, position], color=colour, linewidth=2.5, solid_capstyle="round", alpha=0.55)
            axes.plot(result[name], position, "o", color=colour, markersize=7, label=KINDS[colour])
            axes.annotate(
                f"{result[name]:.3f}", (high, position), (6, 0), textcoords="offset points", va="center", fontsize=9, color=colour
            )
        axes.set_xlabel(f"{label}, 95 % interval", color=INK)
        axes.margins(x=0.05, y=0.12)
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.14 * (right - left))  # room for the rightmost number
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_yticks(range(len(ordered)), [result["model"].replace("+", " +\n") for result in ordered])
    handles, kinds = panels[0].get_legend_handles_labels()
    entries = dict(zip(kinds[::-1], handles[::-1], strict=True))  # one for each kind, the best first
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=len(entries), frameon=False, fontsize=9)
    plt.close(figure)  # constrained layout, so not `finished`, which would lay it out anew
    return figure


def confusion_figure(metrics: Sequence[Mapping[str, object]]) -> Figure:
    """Confusion matrices side by side: share of each true label, counts written in the cells."""
    figure, panels = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 3.4), squeeze=False)
    for axes, result in zip(panels[0], metrics, strict=True):
        confusion = np.array(result["confusion"])  # (3, 4)
        columns = 4 if confusion[:, 3].any() else 3
        confusion = confusion[:, :columns]
        shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1)
        for row, column in np.ndindex(*confusion.shape):
            colour = "white" if shares[row, column] > 0.6 else INK
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=10)
        axes.set_xticks(range(columns), (*LABELS, "no label")[:columns], rotation=30, ha="right", fontsize=9)
        axes.set_yticks(range(3), LABELS if axes is panels[0][0] else ["", "", ""], fontsize=9)
        axes.set_title(result["model"], fontsize=10, color=INK)
        axes.set_xlabel("predicted", fontsize=9)
        axes.spines[:].set_visible(False)
    panels[0][0].set_ylabel("true", fontsize=9)
    return finished(figure)


def reliability_figure(metrics: Mapping[str, object]) -> Figure:
    """Confidence against accuracy, before and after temperature scaling; on the diagonal, confidence means what it says."""
    panels = [("as trained", metrics["reliability"], metrics["ece"])]
    if "temperature" in metrics:
        panels.append((f"temperature {metrics['temperature']:.2f}", metrics["reliability_scaled"], metrics["ece_scaled"]))
    figure, axes_row = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.7), sharey=True, squeeze=False)
    for axes, (name, records, error) in zip(axes_row[0], panels, strict=True):
        bins = pd.DataFrame(records)
        texts = bins["rows"].sum()
        bins = bins.query("rows >= @FEWEST_TEXTS")
        plain_axes(axes).plot([0.3, 1], [0.3, 1], color=MUTED, linestyle="--", linewidth=1)
        axes.plot(bins["confidence"], bins["accuracy"], color=ACCENT, linewidth=1)
        areas = 700 * bins["rows"] / texts
        axes.scatter(bins["confidence"], bins["accuracy"], s=areas, color=ACCENT, alpha=0.7, linewidth=0, clip_on=False)
        axes.set(xlim=(0.3, 1.03), ylim=(0, 1.05), xlabel="confidence")
        axes.set_title(f"{name}: ECE {error:.3f}", fontsize=10, color=INK)
    axes_row[0][0].set_ylabel("accuracy")
    title = f"{metrics['model']}; a circle's area is its number of texts, {FEWEST_TEXTS} or more"
    figure.suptitle(title, fontsize=9, color=INK)
    return finished(figure)


def length_figure(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Macro-F1 by number of words, one line a model."""
    figure, axes = plt.subplots(figsize=(8, 3))
    plain_axes(axes)
    markers = iter("osD^vPX")
    for model, table in tables.items():
        axes.plot(table["words"], table["macro_f1"], marker=next(markers), color=colour_of(model), label=model, linewidth=1.5)
    axes.set(xlabel="words in the text (groups of about equal size)", ylabel="macro-F1")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return finished(figure)


def errors_table(errors: pd.DataFrame) -> Table:
    """The most confident mistakes of a model, text in full."""
    table = Table(errors).format({"confidence": "{:.2f}"}, escape="html").hide(axis="index")
    return table.set_properties(subset=["text"], **{"white-space": "normal", "max-width": "46em"})


def parameters_table(table: pd.DataFrame) -> Table:
    """The parts of a model: parameters, how many are trained, memory; with a last row for the whole."""
    whole = pd.DataFrame([{"part": "together", **table[["parameters", "trainable", "mebibytes"]].sum()}])
    frame = pd.concat([table, whole], ignore_index=True).astype({"parameters": int, "trainable": int})
    formats = {"parameters": "{:,}", "trainable": "{:,}", "mebibytes": "{:.3f}"}
    return Table(frame).format(formats).hide(axis="index")


def learning_figure(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss, validation loss and validation macro-F1 of several runs of one task over their steps; `logs` by model.

    Text to text trains on every piece of a label and is validated on whole labels: the two losses cannot be compared.
    """
    trained_on = "piece of the label" if any("text_to_text" in model for model in logs) else "text"
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), dpi=80, layout="constrained")
    for model, log in logs.items():
        records = pd.DataFrame(log).set_index("step")
        for axes, column in zip(panels, ("loss", "validation_loss", "macro_f1"), strict=True):
            values = records[column].dropna()
            values = values.ewm(span=max(2, len(values) // 20)).mean() if column == "loss" else values
            axes.plot(values.index, values, color=colour_of(model), marker="o" if column != "loss" else "", markersize=3, label=model)
    titles = (f"training loss, per {trained_on}", "validation loss, per text", "validation macro-F1")
    for axes, title in zip(panels, titles, strict=True):
        plain_axes(axes).set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("step")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(logs), frameon=False, fontsize=9)
    plt.close(figure)  # constrained layout, so not `finished`, which would lay it out anew
    return figure


def label_efficiency_figure(curve: pd.DataFrame) -> Figure:
    """Macro-F1 against the share of labels used, one line a model: `fraction`, `model`, `macro_f1`, `low`, `high`."""
    figure, axes = plt.subplots(figsize=(6.5, 3.6))
    plain_axes(axes)
    markers, lines = iter("osD^vPX"), {kind: cycle(("-", "--", ":")) for kind in KINDS}
    for model, rows in curve.sort_values("fraction").groupby("model", sort=False):
        colour = colour_of(model)
        axes.fill_between(rows["fraction"], rows["low"], rows["high"], color=colour, alpha=0.12, linewidth=0)
        axes.plot(rows["fraction"], rows["macro_f1"], next(lines[colour]), marker=next(markers), color=colour, label=model)
    axes.set_xscale("log")
    ticks = sorted(curve["fraction"].unique())
    axes.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="share of the training labels", ylabel="macro-F1")
    axes.legend(frameon=False, fontsize=9)
    return finished(figure)
