"""What a comparison comes to: scores of every model, paired differences, the table and the pictures.

A model may be the average of several, as in `pretrained_head+text_to_text`: of their probabilities, so it costs no training of its own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.baselines import BASELINES
from src.config import METHODS
from src.cross_validation import Finished, Split
from src.display.evaluation import best_of_each_kind, intervals_figure, label_efficiency_figure, length_figure, reliability_figure
from src.error_analysis import macro_f1_by_length
from src.evaluation import averaged, compare_models, evaluate_predictions, joint_costs, members_of, scores_without

# What every fine-tuned model is compared with, beside its own adapters.
REFERENCES = ("tfidf_svm", "tfidf_word_list_svm", "random_init", "text_to_text_random_init")
OVERLAPS = ("overlap", "repeated")  # of the texts of a published split: near duplicates of training rows, or their very texts


def joint(model: str, finished: Mapping[str, Sequence[Finished]]) -> list[Finished]:
    """The average of a model's members, fold by fold and seed by seed; a baseline, which has one seed, is beside every seed of the others.

    It has a temperature if all members held out rows for one.
    """
    members = [finished[member] for member in members_of(model)]
    results = []
    for lead in max(members, key=len):
        parts = [beside(lead, member) for member in members]
        validation = [part.validation for part in parts if part.validation is not None]
        test = averaged([part.test for part in parts]).assign(model=model)
        held_out = averaged(validation).assign(model=model) if len(validation) == len(parts) else None
        costs = joint_costs([part.costs for part in parts])
        results.append(Finished(replace(lead.job, model=model, learning_rate=None), test, held_out, None, costs))
    return results


def beside(lead: Finished, results: Sequence[Finished]) -> Finished:
    """Of another model's results that of the same fold, and of the same seed if it has several."""
    same = [result for result in results if result.job.fold == lead.job.fold]
    return next((result for result in same if result.job.seed == lead.job.seed), same[0])


def report_of(finished: Mapping[str, Sequence[Finished]], splits: Sequence[Split]) -> dict[str, Any]:
    """Scores of every model and the paired comparisons that matter."""
    predictions = {model: averaged([result.test for result in results]) for model, results in finished.items()}
    seen = {mark: {text_id for split in splits for text_id in split.test.loc[split.test[mark], "text_id"]} for mark in OVERLAPS}
    draw_of = {split.fold: split.draw for split in splits}
    texts = pd.concat([split.test for split in splits]).drop_duplicates("text_id")
    models = []
    for model, results in finished.items():
        validation = [result.validation for result in results if result.validation is not None]
        entry = {"name": model, **evaluate_predictions(predictions[model], averaged(validation) if validation else None)}
        entry |= {key: float(np.mean([result.costs[key] for result in results])) for key in results[0].costs}
        entry["by_length"] = macro_f1_by_length(predictions[model], texts).to_dict("records")
        seeds = [result.job.seed for result in results]
        entry["runs"] = scores_by("seed", zip(seeds, (result.test for result in results), strict=True))
        if any(result.generated is not None for result in results):
            entry["generated"] = scores_by("seed", zip(seeds, (result.generated for result in results), strict=True))
        if len(set(draw_of.values())) > 1:
            entry["draws"] = scores_by("split_seed", ((draw_of[fold], rows) for fold, rows in predictions[model].groupby("fold")))
        for mark, text_ids in seen.items():
            if text_ids and (rest := scores_without(predictions[model], text_ids)):
                entry[f"without_{mark}"] = {key: rest[key] for key in ("rows", "accuracy", "macro_f1", "accuracy_ci95")}
        models.append(entry)
    pairs = [(model, other) for model in predictions for other in rivals_of(model) if other in predictions and model != other]
    return {"models": models, "comparisons": [compare_models(predictions[first], predictions[second]) for first, second in pairs]}


def rivals_of(model: str) -> list[str]:
    """What a model is compared with: the references, and its own adapters or the members that it is made of; a baseline with nothing."""
    if model in BASELINES:
        return []
    members = members_of(model)
    return list(dict.fromkeys([*REFERENCES, *(members if len(members) > 1 else (f"{model}_{method}" for method in METHODS))]))


def scores_by(name: str, parts: Iterable[tuple[int, pd.DataFrame]]) -> list[dict[str, Any]]:
    """Scores of all predictions of one seed together, then of the next: `parts` are pairs of a seed and predictions, `name` is its key."""
    frames: dict[int, list[pd.DataFrame]] = {}
    for seed, frame in parts:
        frames.setdefault(seed, []).append(frame)
    entries = []
    for seed, its in sorted(frames.items()):
        scores = evaluate_predictions(pd.concat(its), resamples=1)
        entries.append({name: seed, **{key: scores[key] for key in ("accuracy", "macro_f1", "invalid_rate")}})
    return entries


def write_report(report: Mapping[str, Any], output: Path | None) -> None:
    """The table on standard output; JSON and pictures where asked for."""
    width = 2 + max(len(model["name"]) for model in report["models"])
    print(f"\n{'model':<{width}}{'accuracy':>9}{'macro-F1':>10}  95 % of macro-F1")
    ranked = sorted(report["models"], key=lambda model: -model["macro_f1"])
    for model in ranked:
        low, high = model["macro_f1_ci95"]
        print(f"{model['name']:<{width}}{model['accuracy']:>9.3f}{model['macro_f1']:>10.3f}  {low:.3f} to {high:.3f}")
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    by_length = {model["name"]: pd.DataFrame(model["by_length"]) for model in best_of_each_kind(ranked)}
    figures = {"": intervals_figure(ranked), "_by_length": length_figure(by_length)}
    if calibrated := [model for model in ranked if "temperature" in model]:
        figures["_reliability"] = reliability_figure(calibrated[0])
    if report.get("fractions"):
        figures["_label_efficiency"] = label_efficiency_figure(pd.DataFrame(report["fractions"]))
    for suffix, figure in figures.items():
        figure.savefig(output.with_name(f"{output.stem}{suffix}.png"), dpi=120)
