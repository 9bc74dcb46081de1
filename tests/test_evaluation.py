"""Evaluation against scikit-learn and against answers that are known beforehand."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as reference

from src import calibration, error_analysis, evaluation
from src.evaluation import NO_LABEL, PREDICTION_COLUMNS, EvaluationError, averaged, compare_models, evaluate_predictions, predictions_frame
from src.labels import LABELS


def rows_of(labels):
    return pd.DataFrame({"text_id": [f"t{i}" for i in range(len(labels))], "label": labels})


def judged(rng, rows=300, skill=2.0, model="model"):
    """Predictions of a model that knows something: noisy logits with a bump at the true label."""
    labels = rng.choice(3, rows, p=[0.2, 0.5, 0.3])
    logits = rng.normal(size=(rows, 3)) + skill * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return predictions_frame(rows_of(labels), probabilities, model)


def test_scores_are_those_of_scikit_learn():
    """Scores computed from confusion counts drift from the field's definitions: numbers could not be compared with papers."""
    predictions = judged(np.random.default_rng(0))
    predictions.loc[::17, "prediction"] = NO_LABEL
    found = evaluate_predictions(predictions, resamples=20)
    true, predicted = predictions["label"], predictions["prediction"]
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(true, predicted, labels=[0, 1, 2], average="macro"))
    assert found["mcc"] == pytest.approx(reference.matthews_corrcoef(true, predicted))
    precision, recall, f1, support = reference.precision_recall_fscore_support(true, predicted, labels=[0, 1, 2])
    for index, label in enumerate(LABELS):
        expected = {"precision": precision[index], "recall": recall[index], "f1": f1[index], "support": support[index]}
        assert found["per_class"][label] == pytest.approx(expected)
    assert np.array_equal(np.array(found["confusion"])[:, :3], reference.confusion_matrix(true, predicted, labels=[0, 1, 2]))
    assert np.array(found["confusion"]).sum() == 300


def test_an_output_that_is_no_label_counts_as_wrong():
    """A generator that says something else would be scored only on the texts where it behaved."""
    predictions = predictions_frame(rows_of([0, 1, 2, 1]), np.eye(3)[[0, 1, 2, 1]], "generator", predictions=[0, NO_LABEL, 2, 1])
    found = evaluate_predictions(predictions, resamples=10)
    assert found["accuracy"] == 0.75
    assert found["invalid_rate"] == 0.25
    assert found["confusion"][1] == [0, 1, 0, 1]


def test_intervals_hold_the_truth_as_often_as_they_promise():
    """Intervals too narrow call chance a result. The true accuracy of 0.7 must lie inside about 95 of 100 times."""
    rng, inside = np.random.default_rng(1), 0
    for trial in range(100):
        labels = rng.choice(3, 200)
        right = rng.random(200) < 0.7
        predictions = predictions_frame(rows_of(labels), np.eye(3)[np.where(right, labels, (labels + 1) % 3)], "model")
        low, high = evaluate_predictions(predictions, resamples=200, seed=trial)["accuracy_ci95"]
        inside += low <= 0.7 <= high
    assert 88 <= inside <= 100


def test_paired_comparison_sees_what_single_intervals_hide():
    """Two models that agree on most rows: the difference is sure though both intervals overlap. Order of rows must not matter."""
    rng = np.random.default_rng(2)
    labels = rng.choice(3, 400)
    second_right = rng.random(400) < 0.70
    first_right = second_right | (rng.random(400) < 0.15)
    frames = [
        predictions_frame(rows_of(labels), np.eye(3)[np.where(right, labels, (labels + 1) % 3)], name)
        for right, name in ((first_right, "first"), (second_right, "second"))
    ]
    result = compare_models(frames[0], frames[1].sample(frac=1, random_state=0))
    gained = int((first_right & ~second_right).sum())
    assert (result["only_first_right"], result["only_second_right"]) == (gained, 0)
    assert result["accuracy_difference"] == pytest.approx(gained / 400)
    assert result["accuracy_difference_ci95"][0] > 0
    assert result["mcnemar_p"] == pytest.approx(2 * 0.5**gained)  # the exact binomial test with nothing on the other side
    assert result["bootstrap_p"] == pytest.approx(2 / 2_001)  # no resample turns it round; that does not make it impossible
    same = compare_models(frames[0], frames[0].assign(model="copy"))
    assert (same["macro_f1_difference"], same["mcnemar_p"], same["bootstrap_p"]) == (0, 1, 1)


def test_a_text_judged_in_several_draws_is_one_text():
    """Three times the same judgements are no three times the evidence: intervals a third narrower would call chance a result."""
    first, second = (judged(np.random.default_rng(7), skill=skill, model=f"skill {skill}") for skill in (2.0, 1.8))
    draws = [pd.concat([frame.assign(fold=draw) for draw in range(3)]) for frame in (first, second)]
    once, thrice = evaluate_predictions(first), evaluate_predictions(draws[0])
    for key in ("rows", "accuracy", "accuracy_ci95", "macro_f1_ci95", "mcc_ci95"):
        assert thrice[key] == pytest.approx(once[key]), key
    assert thrice["confusion"] == (3 * np.array(once["confusion"])).tolist()
    paired, expected = compare_models(*draws), compare_models(first, second)
    assert paired["only_first_right"] > 0
    for key in ("accuracy_difference_ci95", "macro_f1_difference_ci95", "bootstrap_p", "mcnemar_p", "only_first_right"):
        assert paired[key] == pytest.approx(expected[key]), key
    # Right in two draws of three beats right in one: neither of them alone has it right always.
    text = pd.DataFrame({"text_id": list("abc"), "label": [0, 1, 2]})
    sides = [
        pd.concat([predictions_frame(text, np.eye(3)[[0 if draw < hits else 1, 1, 2]], name, fold=draw) for draw in range(3)])
        for name, hits in (("first", 2), ("second", 1))
    ]
    assert compare_models(*sides, resamples=5)["only_first_right"] == 1
    assert evaluate_predictions(sides[0], resamples=5)["accuracy"] == pytest.approx(8 / 9)


def test_temperature_repairs_overconfidence_and_keeps_the_order():
    """Temperature scaling fitted wrongly would change labels or leave confidence as wrong as it was."""
    assert calibration.scale_temperature(np.array([[0.64, 0.32, 0.04]]), 2).tolist()[0] == pytest.approx(
        np.sqrt([0.64, 0.32, 0.04]) / 1.5657, rel=1e-3
    )
    rng = np.random.default_rng(3)
    honest_validation, honest_test = judged(rng, 4_000), judged(rng, 4_000)
    honest_validation["text_id"] = "held-out-" + honest_validation["text_id"]
    overconfident = []
    for frame in (honest_validation, honest_test):
        probabilities = calibration.scale_temperature(frame[list(evaluation.PROBABILITY_COLUMNS)].to_numpy(), 1 / 3)
        overconfident.append(predictions_frame(frame, probabilities, "overconfident"))
    found = evaluate_predictions(overconfident[1], overconfident[0], resamples=10)
    # The noise that made the logits is Gaussian, not Gumbel, so even the honest model is not at temperature 1 exactly.
    honest = calibration.fit_temperature(honest_validation[list(evaluation.PROBABILITY_COLUMNS)].to_numpy(), honest_validation["label"])
    assert found["temperature"] == pytest.approx(3 * honest, rel=0.02)
    assert found["ece_scaled"] < 0.03 < found["ece"]
    drawn = [calibration.expected_calibration_error(pd.DataFrame(found[key])) for key in ("reliability", "reliability_scaled")]
    assert drawn == [found["ece"], found["ece_scaled"]]  # the diagram shows what the number says
    assert (overconfident[1]["prediction"] == honest_test["prediction"]).all()


def test_no_text_is_scaled_by_a_temperature_that_knows_its_label(monkeypatch):
    """What one fold holds out another judges: fitted on all of it, the temperature has seen labels of the texts it is judged on."""
    rows = judged(np.random.default_rng(4), 60).assign(fold=np.arange(60) % 2)
    fit, fitted = calibration.fit_temperature, []
    monkeypatch.setattr(evaluation, "fit_temperature", lambda p, labels: fitted.append(len(labels)) or fit(p, labels))
    evaluate_predictions(rows, rows[:20], resamples=2)
    assert fitted == [10, 10, 20]  # each fold without its own, then all, which is what is saved
    assert evaluate_predictions(rows[:40], rows[40:], resamples=2)["temperature"] == fit(*evaluation.columns_of(rows[40:]))


def test_calibration_error_by_hand():
    """Four texts at confidence 0.9, half of them right: the gap is 0.4; two at 0.6, one right: 0.1. Weighted by texts: 0.3."""
    probabilities = np.array([[0.9, 0.05, 0.05]] * 4 + [[0.2, 0.6, 0.2]] * 2)
    bins = calibration.reliability_bins(probabilities, np.array([0, 0, 1, 2, 1, 0]))
    assert calibration.expected_calibration_error(bins) == pytest.approx(0.3)
    assert bins["rows"].tolist() == [2, 4]


def test_tables_name_the_texts():
    """A table of errors that joins the wrong texts sends the reader after the wrong mistakes."""
    labels = [0, 1, 2, 0]
    rows = rows_of(labels).assign(text=["down " * 3, "flat " * 9, "up " * 3, "down " * 9])
    probabilities = np.array([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.95, 0.03, 0.02], [0.6, 0.2, 0.2]])
    predictions = predictions_frame(rows, probabilities, "model")
    errors = error_analysis.worst_errors(predictions, rows)
    assert errors["text"].tolist() == ["up " * 3, "down " * 3]
    assert errors["prediction"].tolist() == ["bearish", "neutral"]
    by_length = error_analysis.macro_f1_by_length(predictions, rows, quantiles=2)
    assert by_length["words"].tolist() == ["3", "9"]
    assert by_length["accuracy"].tolist() == [0.0, 1.0]
    assert by_length["macro_f1"].tolist() == [0.0, 1.0]  # over the classes that a group holds
    same = error_analysis.macro_f1_by_length(predictions, rows.assign(text="one two"), quantiles=2)
    assert same["words"].tolist() == ["2"]


BAD = {
    "empty": (lambda f: f.iloc[:0], "predictions are empty: give"),
    "nothing": (lambda _: pd.DataFrame(), "predictions are empty: give"),
    "column": (lambda f: f.drop(columns="fold"), "lack the column 'fold'"),
    "class": (lambda f: f[f["label"] != 2], "fold 0 has no bullish text"),
    "label": (lambda f: f.assign(label=7), "a label outside 0..2"),
    "prediction": (lambda f: f.assign(prediction=3), "a prediction outside -1..2"),
    "twice": (lambda f: pd.concat([f, f]), "judged twice"),
    "models": (lambda f: pd.concat([f, f.assign(model="other")]), "evaluate one at a time"),
    "probabilities": (lambda f: f.assign(p_neutral=2.0), "add up to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_predictions_stop_with_one_line(case):
    """Each would otherwise give a number that means nothing."""
    spoil, message = BAD[case]
    with pytest.raises(EvaluationError, match=message) as error:
        evaluate_predictions(spoil(judged(np.random.default_rng(4))))
    assert "\n" not in str(error.value)


def test_several_seeds_become_one_model():
    """Averaging labels instead of probabilities, or counting each text once for each seed, narrows the interval for nothing."""
    rows = pd.DataFrame({"text_id": ["a", "b", "c"], "label": [0, 1, 2]})
    first = predictions_frame(rows, np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.0, 0.2, 0.8]]), "model")
    second = predictions_frame(rows, np.array([[0.4, 0.6, 0.0], [0.1, 0.9, 0.0], [0.0, 0.6, 0.4]]), "model")
    together = averaged([first, second])
    assert tuple(together) == PREDICTION_COLUMNS
    assert together["prediction"].tolist() == [0, 1, 2]
    assert together["p_bearish"].tolist() == pytest.approx([0.65, 0.35, 0.0])
    assert evaluate_predictions(together, resamples=5)["rows"] == 3
    own = first.assign(prediction=[2, 2, 2])
    assert averaged([own])["prediction"].tolist() == [2, 2, 2]  # one seed keeps its own labels
    with pytest.raises(EvaluationError, match="some texts are judged 1 times and others 2 times"):
        averaged([first, second[:2]])


def test_models_judged_on_different_rows_are_not_compared():
    """A paired test on unpaired rows is worse than none."""
    first, second = judged(np.random.default_rng(5)), judged(np.random.default_rng(6), model="other")
    with pytest.raises(EvaluationError, match="different rows"):
        compare_models(first, second)
