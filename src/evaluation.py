"""One way to judge every model: one schema of predictions in, one dictionary of metrics out.

Baselines, both fine-tuned models and the cross-validated comparison all hand over the same frame, so no two numbers
in a table were made differently. The trade-off: intervals come from resampling the test texts (bootstrap), which says how
sure the score of *these* trained models is, and nothing about training them again with another seed or on other folds.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from src.calibration import expected_calibration_error, fit_temperature, reliability_bins, scale_temperature
from src.labels import LABELS, absent_labels

PROBABILITY_COLUMNS = tuple(f"p_{label}" for label in LABELS)
PREDICTION_COLUMNS = ("text_id", "label", "prediction", *PROBABILITY_COLUMNS, "fold", "model")
NO_LABEL = -1  # the prediction of a generator whose output is none of the labels: always wrong
SCORES = ("accuracy", "macro_f1", "mcc")
# What a fine-tuned model's `costs` hold, as tables name it: millions of parameters, and memory of weights, gradients, optimizer state.
COSTS = {"parameters": "parameters, M", "trainable": "trained, M", "seconds": "training, s", "mebibytes": "memory, MiB"}


def joint_costs(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What several models cost together: trained one after another, so they need the memory of the largest. Baselines cost nothing."""
    known = {key: [each[key] for each in costs if key in each] for key in COSTS}
    return {key: max(values) if key == "mebibytes" else sum(values) for key, values in known.items() if values}


class EvaluationError(ValueError):
    """Predictions that cannot be judged."""


def predictions_frame(
    rows: pd.DataFrame, probabilities: np.ndarray, model: str, *, predictions: Sequence[int] | np.ndarray | None = None, fold: int = 0
) -> pd.DataFrame:
    """Predictions in the one schema.

    Args:
        rows: `text_id` and `label` of the judged texts.
        probabilities: float (rows, 3) in the order of `LABELS`; each row adds up to 1.
        model: name that tables show.
        predictions: label ids (rows,), `NO_LABEL` where the model gave none; None: the most probable label.
        fold: which cross-validation fold the rows are.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)  # (rows, 3)
    if probabilities.shape != (len(rows), len(LABELS)):
        raise EvaluationError(f"model {model}: probabilities have shape {probabilities.shape}, expected ({len(rows)}, {len(LABELS)})")
    frame = pd.DataFrame({"text_id": rows["text_id"].to_numpy(), "label": rows["label"].to_numpy(dtype=np.int64)})
    frame["prediction"] = probabilities.argmax(1) if predictions is None else np.asarray(predictions, dtype=np.int64)
    frame[list(PROBABILITY_COLUMNS)] = probabilities
    return frame.assign(fold=fold, model=model)


def members_of(model: str) -> list[str]:
    """The models that one is the average of, by its name `a+b`; itself where it is none."""
    return model.split("+")


def averaged(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Predictions of several seeds or models on the same rows as one: probabilities averaged, the most probable label chosen.

    Frames of different rows are put together as they are: a baseline may take its label elsewhere than from its probabilities.

    Raises:
        EvaluationError: some rows were judged by more of them than others.
    """
    together = pd.concat(frames, ignore_index=True)
    rows = together.groupby(["fold", "text_id"], sort=False)
    counts = rows.size()
    if (counts == 1).all():
        return together
    if counts.nunique() > 1:
        raise EvaluationError(
            f"model {frames[0]['model'].iloc[0]}: some texts are judged {counts.min()} times and others {counts.max()} times"
        )
    mean = rows[list(PROBABILITY_COLUMNS)].mean().reset_index()
    kept = together.drop_duplicates(["fold", "text_id"])[["text_id", "label", "fold", "model"]].merge(mean, on=["fold", "text_id"])
    return kept.assign(prediction=kept[list(PROBABILITY_COLUMNS)].to_numpy().argmax(1))[list(PREDICTION_COLUMNS)]


def check_predictions(predictions: pd.DataFrame) -> None:
    """Refuse what has no meaning as predictions of one model.

    Raises:
        EvaluationError: a column or every row missing, several models, unknown labels, rows judged twice, probabilities that
            do not add up to 1, or a fold without one of the classes.
    """
    if predictions.empty:
        raise EvaluationError("predictions are empty: give the model at least one text to judge")
    missing = [column for column in PREDICTION_COLUMNS if column not in predictions]
    if missing:
        raise EvaluationError(f"predictions lack the column {missing[0]!r}: expected {', '.join(PREDICTION_COLUMNS)}")
    models = predictions["model"].unique()
    name = models[0]
    if len(models) > 1:
        raise EvaluationError(f"predictions hold {len(models)} models ({', '.join(map(str, models))}): evaluate one at a time")
    if not predictions["label"].isin(range(len(LABELS))).all():
        raise EvaluationError(f"model {name}: a label outside 0..{len(LABELS) - 1} stands in the predictions")
    if not predictions["prediction"].isin(range(NO_LABEL, len(LABELS))).all():
        raise EvaluationError(f"model {name}: a prediction outside {NO_LABEL}..{len(LABELS) - 1} stands in the predictions")
    if predictions.duplicated(["text_id", "fold"]).any():
        raise EvaluationError(f"model {name}: a text_id is judged twice in one fold")
    probabilities = predictions[list(PROBABILITY_COLUMNS)].to_numpy(dtype=np.float64)
    if not (np.isfinite(probabilities).all() and (probabilities >= 0).all() and np.allclose(probabilities.sum(1), 1, atol=1e-3)):
        raise EvaluationError(f"model {name}: probabilities must be finite, not negative and add up to 1")
    for fold, labels in predictions.groupby("fold")["label"]:
        if absent := absent_labels(labels):
            raise EvaluationError(f"fold {fold} has no {absent[0]} text: use fewer folds or more labelled rows")


def scores_from_confusion(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of one or many confusion matrices at once, as scikit-learn defines them (`zero_division=0`).

    Args:
        confusion: counts (..., 3, 4): true label by predicted label, the last column `NO_LABEL`.

    Returns:
        `accuracy`, `macro_f1`, `mcc` (Gorodkin 2004, eq. 8) of shape (...); `precision`, `recall`, `f1` of shape (..., 3).
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)[..., : len(LABELS)]  # (..., 3): numpy takes the main diagonal of 3 x 4
    true, predicted = confusion.sum(-1), confusion.sum(-2)  # (..., 3), (..., 4)
    total, correct = true.sum(-1), hits.sum(-1)  # (...)

    def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator > 0)

    f1 = ratio(2 * hits, true + predicted[..., :3])
    covariance = correct * total - (true * predicted[..., :3]).sum(-1)
    spread = np.sqrt((total**2 - (true**2).sum(-1)) * (total**2 - (predicted**2).sum(-1)))
    return {
        "accuracy": ratio(correct, total),
        "macro_f1": f1.mean(-1),
        "mcc": ratio(covariance, spread),
        "precision": ratio(hits, predicted[..., :3]),
        "recall": ratio(hits, true),
        "f1": f1,
    }


def confusion_cells(predictions: pd.DataFrame) -> np.ndarray:
    """How often each text, in order of appearance, falls in each of the 3 x 4 cells of the confusion matrix: float32 (texts, 12).

    Once, where each text is judged once; over several draws of the folds once a draw. What is resampled is then the text with all its
    judgements: they hang together, and counted as so many texts they would narrow the interval for nothing.
    """
    texts, names = pd.factorize(predictions["text_id"])
    predicted = predictions["prediction"].to_numpy() % (len(LABELS) + 1)  # NO_LABEL = -1 becomes the last column
    cells = np.zeros((len(names), 12), dtype=np.float32)
    np.add.at(cells, (texts, predictions["label"].to_numpy() * 4 + predicted), 1)
    return cells


def resampled_confusions(cells: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Confusion matrices (resamples, 3, 4) of bootstrap resamples of the texts; equal seeds draw equal texts."""
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(len(cells), np.full(len(cells), 1 / len(cells))).astype(np.float32) @ cells for _ in range(resamples)]
    return np.stack(counts).reshape(resamples, 3, 4)


def interval(samples: np.ndarray) -> list[float]:
    """The central 95 % of bootstrap samples, [low, high]."""
    return [float(value) for value in np.percentile(samples, [2.5, 97.5])]


def evaluate_predictions(
    predictions: pd.DataFrame, validation: pd.DataFrame | None = None, *, resamples: int = 1_000, seed: int = 0
) -> dict[str, object]:
    """Every score of one model's predictions (schema `PREDICTION_COLUMNS`), over all folds together.

    Args:
        predictions: the judged rows of one model; a text may stand in several folds, one of each draw of them.
        validation: the same model's predictions on validation rows; the temperature is fitted there and nowhere else. Those of one
            fold may be judged in another: what is scaled is never scaled by a temperature that its own label helped to fit.
        resamples: bootstrap resamples behind the 95 % intervals.

    Returns:
        JSON-ready: `rows` (texts), `accuracy`, `macro_f1`, `mcc`, each with `<score>_ci95`; `per_class`; `confusion` (3 x 4, last
        column: no label); `invalid_rate`; `ece` and its `reliability` bins; with `validation` also `temperature`, `ece_scaled` and
        `reliability_scaled`; `folds`.
    """
    check_predictions(predictions)
    cells = confusion_cells(predictions)
    confusion = cells.sum(0).reshape(3, 4)
    scores, samples = scores_from_confusion(confusion), scores_from_confusion(resampled_confusions(cells, resamples, seed))
    per_class = {
        label: {key: float(scores[key][i]) for key in ("precision", "recall", "f1")} | {"support": int(confusion[i].sum())}
        for i, label in enumerate(LABELS)
    }
    probabilities, labels = columns_of(predictions)
    metrics = {"model": str(predictions["model"].iloc[0]), "rows": len(cells)}
    metrics |= {name: float(scores[name]) for name in SCORES} | {f"{name}_ci95": interval(samples[name]) for name in SCORES}
    metrics |= {"per_class": per_class, "confusion": confusion.astype(int).tolist()}
    metrics |= {"invalid_rate": float((predictions["prediction"] == NO_LABEL).mean())}
    metrics |= calibration_of(probabilities, labels)
    if validation is not None:
        check_predictions(validation)
        scaled = np.empty_like(probabilities)
        for fold in predictions["fold"].unique():
            judged = (predictions["fold"] == fold).to_numpy()
            others = validation[~validation["text_id"].isin(predictions.loc[judged, "text_id"])]
            if others.empty:
                raise EvaluationError(f"model {metrics['model']}: every validation row is judged in fold {fold}: hold other rows out")
            scaled[judged] = scale_temperature(probabilities[judged], fit_temperature(*columns_of(others)))
        metrics |= {"temperature": fit_temperature(*columns_of(validation))} | calibration_of(scaled, labels, "_scaled")
    return metrics | {"folds": [fold_scores(fold, rows) for fold, rows in predictions.groupby("fold")]}


def calibration_of(probabilities: np.ndarray, labels: np.ndarray, suffix: str = "") -> dict[str, object]:
    """`ece` and, for the diagram, the bins that it comes from."""
    bins = reliability_bins(probabilities, labels)
    return {f"ece{suffix}": expected_calibration_error(bins), f"reliability{suffix}": bins.to_dict("records")}


def columns_of(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, float64 (rows, 3), and labels (rows,)."""
    return predictions[list(PROBABILITY_COLUMNS)].to_numpy(), predictions["label"].to_numpy()


def scores_without(predictions: pd.DataFrame, text_ids: Collection[str]) -> dict[str, object] | None:
    """One model's scores on all texts but these, e.g. those it may have read before; None where that leaves a class without a text.

    Returns:
        `model`, `rows`, `accuracy`, `macro_f1`, `accuracy_ci95`.
    """
    rest = predictions[~predictions["text_id"].isin(text_ids)]
    if rest["label"].nunique() < len(LABELS):
        return None
    scores = evaluate_predictions(rest)
    return {key: scores[key] for key in ("model", "rows", "accuracy", "macro_f1", "accuracy_ci95")}


def fold_scores(fold: object, rows: pd.DataFrame) -> dict[str, object]:
    """Accuracy and macro-F1 of one fold alone."""
    scores = scores_from_confusion(confusion_cells(rows).sum(0).reshape(3, 4))
    return {"fold": int(fold), "rows": len(rows), "accuracy": float(scores["accuracy"]), "macro_f1": float(scores["macro_f1"])}


def compare_models(first: pd.DataFrame, second: pd.DataFrame, *, resamples: int = 2_000, seed: int = 0) -> dict[str, object]:
    """Is the first model better than the second on the same rows?

    The paired bootstrap resamples texts and scores both models on each resample; McNemar's exact test asks whether the texts
    that only one of them gets right are split evenly (Dietterich 1998). Over several draws of the folds it is the sign test of
    the texts that one of them gets right more often.

    Returns:
        `accuracy_difference`, `macro_f1_difference` (first minus second) with `_ci95`, `bootstrap_p` (two-sided, of macro-F1),
        `only_first_right`, `only_second_right`, `mcnemar_p`.

    Raises:
        EvaluationError: the two were not judged on the same rows.
    """
    check_predictions(first)
    check_predictions(second)
    first, second = (frame.sort_values(["fold", "text_id"], ignore_index=True) for frame in (first, second))
    if len(first) != len(second) or not (first[["fold", "text_id", "label"]] == second[["fold", "text_id", "label"]]).all(axis=None):
        raise EvaluationError(f"{first['model'][0]} and {second['model'][0]} were judged on different rows: compare them on the same")
    cells = [confusion_cells(frame) for frame in (first, second)]
    point = [scores_from_confusion(cell.sum(0).reshape(3, 4)) for cell in cells]
    samples = [scores_from_confusion(resampled_confusions(cell, resamples, seed)) for cell in cells]
    result: dict[str, object] = {"first": str(first["model"][0]), "second": str(second["model"][0])}
    differences = {name: samples[0][name] - samples[1][name] for name in ("accuracy", "macro_f1")}
    for name, resampled in differences.items():
        result |= {f"{name}_difference": float(point[0][name] - point[1][name]), f"{name}_difference_ci95": interval(resampled)}
    # No p of zero: a resample is never further out than every one that was not drawn (Davison and Hinkley 1997, eq. 4.11).
    tail = (1 + min((differences["macro_f1"] <= 0).sum(), (differences["macro_f1"] >= 0).sum())) / (1 + resamples)
    right = [cell.reshape(-1, 3, 4).diagonal(axis1=1, axis2=2).sum(1) for cell in cells]  # (texts,): in how many draws
    only_first, only_second = int((right[0] > right[1]).sum()), int((right[1] > right[0]).sum())
    disagreements = only_first + only_second
    mcnemar = float(binomtest(only_first, disagreements).pvalue) if disagreements else 1.0
    result |= {"bootstrap_p": float(min(1.0, 2 * tail)), "mcnemar_p": mcnemar}
    return result | {"only_first_right": only_first, "only_second_right": only_second}
