"""Tables and pictures of stage 3: packed rows, span corruption, curves, spans filled in, position biases.

Functions take arrays, logs and models and hand back HTML or a matplotlib figure; they compute nothing that is not shown.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, DisplayHandle
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import nn

from src.attention import relative_position_bucket
from src.display.data import changes_table, table
from src.display.style import ACCENT, GRID, INK, Table, finished, plain_axes
from src.distant_supervision import LabelledSentences
from src.initialisation import CheckpointStart, InformedStart
from src.labels import LABELS
from src.tokenizer import WORD_START

SCREEN_DPI = 72  # keeps a notebook of several figures small
EXAMPLE_COLOURS = ("#fde68a", "#bfdbfe", "#bbf7d0", "#fecaca", "#ddd6fe", "#fed7aa", "#a5f3fc", "#e5e7eb")
BOX = "font-family:monospace;font-size:12px;line-height:1.7;color:#22303c;background:#ffffff;padding:8px;overflow-wrap:anywhere"


def token_spans(pieces: Sequence[str], colours: Sequence[str | None]) -> str:
    """Pieces as HTML, each on its colour; SentencePiece's word mark is shown as a space."""
    spans = []
    for piece, colour in zip(pieces, colours, strict=True):
        style = f"background:{colour};border-radius:2px;padding:1px 0" if colour else ""
        spans.append(f'<span style="{style}">{html.escape(piece.replace(WORD_START, " "))}</span>')
    return "".join(spans)


def packed_row(batch: Mapping[str, torch.Tensor], tokenizer: Any, row: int = 0, shown: int = 512) -> HTML:
    """One row of a batch without its padding, coloured by example: what the encoder reads above, what the decoder is to write below."""
    parts = []
    for title, ids_key, segments_key in (("encoder", "input_ids", "encoder_segment_ids"), ("decoder", "labels", "decoder_segment_ids")):
        all_segments = batch[segments_key][row]  # (length,)
        real = all_segments > 0
        ids, segments = batch[ids_key][row][real].tolist(), all_segments[real].tolist()
        colours = [EXAMPLE_COLOURS[(segment - 1) % len(EXAMPLE_COLOURS)] for segment in segments[:shown]]
        pieces = tokenizer.convert_ids_to_tokens(ids[:shown])
        heading = f"<b>{title}</b>: {max(segments)} example(s), {len(ids)} of {len(real)} positions used"
        parts.append(f"<div>{heading}<br>{token_spans(pieces, colours)}</div>")
    return HTML(f'<div style="{BOX}">{"<br>".join(parts)}</div>')


def corrupted_example(token_ids: np.ndarray, mask: np.ndarray, inputs: np.ndarray, targets: np.ndarray, tokenizer: Any) -> HTML:
    """A text with its masked spans marked, beside the inputs and targets made from it."""
    spans = np.cumsum(mask & ~np.concatenate(([False], mask[:-1])))  # number of the span a masked token belongs to
    columns = [("text, masked spans marked", token_ids, np.where(mask, spans, 0))]
    for title, ids in (("inputs", inputs), ("targets", targets)):
        is_sentinel = np.isin(ids, tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)]))
        number = np.cumsum(is_sentinel)
        columns.append((title, ids, np.where(is_sentinel | (title == "targets"), number, 0)))
    cells = []
    for title, ids, numbers in columns:
        colours = [EXAMPLE_COLOURS[(number - 1) % len(EXAMPLE_COLOURS)] if number else None for number in numbers.tolist()]
        body = token_spans(tokenizer.convert_ids_to_tokens(ids.tolist()), colours)
        cells.append(f'<td style="vertical-align:top;text-align:left;width:33%"><b>{title}</b> ({len(ids)} tokens)<br>{body}</td>')
    return HTML(f'<table style="{BOX};width:100%;table-layout:fixed"><tr>{"".join(cells)}</tr></table>')


def labelled_sentences(sentences: LabelledSentences | None, tokenizer: Any, each: int = 3) -> HTML:
    """Some sentences of each label, with the words that were taken out struck through."""
    if sentences is None:
        return HTML("none: <code>pretraining.labelled_share</code> is 0")
    frame = sentences.draw(10**4, np.random.default_rng(0)).frame(tokenizer).groupby("label").head(each)
    counts = np.bincount(sentences.labels, minlength=len(LABELS))
    caption = "sentences that the word list labels: " + ", ".join(f"{count:,} {label}" for count, label in zip(counts, LABELS, strict=True))
    return changes_table(zip((LABELS[label] for label in frame["label"]), frame["whole"], frame["text"], strict=True), caption)


def packing_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Rows needed and share of real tokens, by way of making rows."""
    frame = pd.DataFrame(rows).T.astype({"rows": int})
    formats = {"rows": "{:,}", "encoder positions used": "{:.2%}", "decoder positions used": "{:.2%}"}
    return Table(frame).format(formats)


def model_table(model: nn.Module) -> Table:
    """Parameters by part; shared weights are counted where they first stand."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        stack, _, rest = name.partition(".")
        part = "embedding (shared)" if stack == "shared" else "norms and position biases" if parameter.ndim < 2 or "bias" in rest else stack
        if part in ("encoder", "decoder"):
            part += (
                ", feed-forward" if "DenseReluDense" in name else ", cross-attention" if "EncDecAttention" in name else ", self-attention"
            )
        counts[part] = counts.get(part, 0) + parameter.numel()
    counts["all"] = sum(counts.values())
    frame = pd.DataFrame({"parameters": counts})
    frame["share"] = frame["parameters"] / counts["all"]
    return Table(frame).format({"parameters": "{:,}", "share": "{:.1%}"})


def steps_and_evaluations(log: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training log as two frames indexed by step: optimizer steps, and evaluations."""
    steps = pd.DataFrame([record for record in log if "loss" in record]).set_index("step")
    evaluations = [record for record in log if "loss" not in record]
    return steps, pd.DataFrame(evaluations).set_index("step") if evaluations else pd.DataFrame()


def smoothed(values: pd.Series) -> pd.Series:
    return values.ewm(span=max(2, len(values) // 40)).mean()


def loss_axes(axes: plt.Axes, log: Sequence[Mapping[str, Any]], second_task: bool) -> None:
    steps, evaluations = steps_and_evaluations(log)
    plain_axes(axes)
    axes.plot(steps.index, steps["loss"], color=GRID, linewidth=1)
    axes.plot(steps.index, smoothed(steps["loss"]), color=INK, linewidth=1.5, label="training, both tasks" if second_task else "training")
    names = {"validation_loss": "validation", "validation_loss_without_sentinels": "validation, no sentinels"}
    for (column, label), style in zip(names.items(), ("-", "--"), strict=True):
        if column in evaluations:
            axes.plot(evaluations.index, evaluations[column], style, color=ACCENT, marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1), columnspacing=1, borderpad=0)


class LiveLossCurve:
    """A loss curve that redraws itself in place in Jupyter after each evaluation: pass it as `on_evaluation`.

    Args:
        second_task: the training loss counts the labels of sentences, too; the validation loss never does.
    """

    def __init__(self, second_task: bool) -> None:
        self.second_task = second_task
        self.handle = DisplayHandle()
        self.handle.display(HTML("<i>the loss curve appears here with the first evaluation</i>"))

    def __call__(self, log: Sequence[Mapping[str, Any]]) -> None:
        figure, axes = plt.subplots(figsize=(7, 3), dpi=SCREEN_DPI)
        loss_axes(axes, log, self.second_task)
        self.handle.update(finished(figure))


def training_curves(log: Sequence[Mapping[str, Any]], second_task: bool) -> Figure:
    """Losses, bits per word, gradient norm and learning rate over the run; `second_task` as for `LiveLossCurve`."""
    steps, evaluations = steps_and_evaluations(log)
    figure, panels = plt.subplots(2, 2, figsize=(10, 6), dpi=SCREEN_DPI)
    loss_axes(panels[0, 0], log, second_task)
    words = plain_axes(panels[0, 1])
    if "validation_bits_per_word" in evaluations:
        words.plot(evaluations.index, evaluations["validation_bits_per_word"], color=ACCENT, marker="o", markersize=3)
    words.set(xlabel="step", ylabel="validation, bits per hidden word")
    norms = plain_axes(panels[1, 0])
    norms.plot(steps.index, steps["gradient_norm"], color=GRID, linewidth=1)
    norms.plot(steps.index, smoothed(steps["gradient_norm"]), color=INK, linewidth=1.5)
    norms.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
    norms.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}", minor_formatter="")
    rates = plain_axes(panels[1, 1])
    rates.plot(steps.index, steps["learning_rate"], color=INK)
    rates.set(xlabel="step", ylabel="learning rate")
    return finished(figure)


def spans_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Context, truth and the model's own writing, span by span; exact hits in bold."""
    frame = pd.DataFrame(rows)
    hits = frame["truth"].str.strip() == frame["written by the model"].str.strip()
    return table(frame).apply(lambda _: np.where(hits, f"font-weight:bold;color:{ACCENT}", ""), subset=["written by the model"])


def position_biases(model: nn.Module, longest: int = 128) -> Figure:
    """Learned relative position bias of each head over the distance from query to key, one picture for each stack."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.35 * model.config.num_heads + 1.8), dpi=SCREEN_DPI)
    for axes, stack in zip(panels, ("encoder", "decoder"), strict=True):
        attention = getattr(model, stack).block[0].layer[0].SelfAttention
        distances = np.arange(-longest, longest + 1 if stack == "encoder" else 1)
        shape = (model.config.relative_attention_num_buckets, model.config.relative_attention_max_distance)
        buckets = relative_position_bucket(torch.from_numpy(distances), stack == "encoder", *shape)
        bias = attention.relative_attention_bias.weight.detach().float().cpu()[buckets].T.numpy()  # (heads, distances)
        limit = max(1e-6, np.abs(bias).max())
        picture = axes.imshow(
            bias,
            aspect="auto",
            interpolation="nearest",
            cmap="PuOr_r",
            vmin=-limit,
            vmax=limit,
            extent=(distances[0], distances[-1], len(bias), 0),
        )
        axes.set_title(f"{stack} self-attention", fontsize=10, color=INK)
        axes.set(xlabel="key position minus query position", ylabel="head", yticks=np.arange(len(bias)) + 0.5)
        axes.set_yticklabels(range(len(bias)))
        axes.spines[:].set_visible(False)
        figure.colorbar(picture, ax=axes, fraction=0.04, label="added to the score")
    return finished(figure)


def decoding_figure(rows: pd.DataFrame) -> Figure:
    """Cache size and decoding speed by batch size; columns kind, batch, mebibytes, tokens_per_second. 16 bit is dashed."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), dpi=SCREEN_DPI)
    batches = sorted(rows["batch"].unique())
    for axes, column, label in zip(panels, ("mebibytes", "tokens_per_second"), ("cache, MiB", "tokens per second"), strict=True):
        plain_axes(axes)
        for kind, part in rows.groupby("kind", sort=False):
            style = "-" if kind.endswith("float32") else "--"
            axes.plot(part["batch"], part[column], style, marker="o", color=INK if kind.startswith("kv") else ACCENT, label=kind)
        axes.set(xlabel="batch size", ylabel=label, xscale="log")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(0, None)
    panels[0].legend(frameon=False, fontsize=9)
    return finished(figure)


def first_weights(start: InformedStart | CheckpointStart | None, tokenizer: Any) -> Table | HTML:
    """Where training starts: neighbours of some tokens, or the checkpoint that it goes on from."""
    if isinstance(start, InformedStart):
        return table(start.nearest_tokens(tokenizer))
    at_random = "All weights are drawn at random."
    return HTML(at_random if start is None else f"Training goes on from the weights of <code>{html.escape(str(start.folder))}</code>.")


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Figures of a run, one a row."""
    frame = pd.DataFrame({"": {name.replace("_", " "): f"{value:,}" for name, value in metrics.items()}})
    return Table(frame).set_properties(**{"text-align": "right"})


def save_figures(folder: Path, **figures: Figure) -> None:
    """Write figures as `figures/<name>.png`."""
    (folder / "figures").mkdir()
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=120)
