"""Copy the numbers under `results/` into the pages that show them: `python -m benchmarks.readme` (`--check` only compares).

A block between `<!-- results NAME -->` and `<!-- end -->` becomes a table of `results/NAME.json`; with several names, one with a column a
name. `<!-- summary NAME NAME -->`, of comparisons of models, has the differences from one baseline only.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from src.evaluation import COSTS

ROOT = Path(__file__).parent.parent
ABSENT = "–"
PAGES = ("README.md", "results/README.md", "results/speed.md", "results/history.md")
BLOCK = re.compile(r"(<!-- (results|summary) ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SUMMARY_BASELINE, CONTROL = "tfidf_word_list_svm", "random_init"
MODEL_COLUMNS = {"accuracy": "accuracy", "accuracy_ci95": "95 %", "macro_f1": "macro-F1", "macro_f1_ci95": "95 %"}
OVERLAP_COLUMNS = {
    ("without_overlap", "accuracy"): "accuracy without near duplicates of train",
    ("without_overlap", "macro_f1"): "macro-F1 without near duplicates of train",
    ("without_repeated", "accuracy"): "accuracy without texts of train",
}
# What the command says already, or a column beside it.
UNSHOWN = ("best_step", "device", "dtype", "labelled", "method", "precision", "profile", "rounds", "threads")
# What names and keys mean; one that is plain words is shown as those.
TITLES = {
    "phrasebank_50agree": "PhraseBank, all",
    "phrasebank_allagree": "PhraseBank, all agree",
    "twitter": "tweets",
    "pretrained_mini": "`mini`",
    "pretrained_mini_labelled": "`mini_labelled`",
    "pretrained_mini_further": "`mini_further`",
    "pretrained_mini_relabelled": "`mini_relabelled`",
    "results/mini": "`mini`",
    "mini_labelled": "`mini_labelled`",
    "mini_further": "`mini_further`",
    "mini_relabelled": "`mini_relabelled`",
    "from_the_first_step": "labels from the first step on",
    "twitter_accuracy": "tweets, accuracy",
    "twitter_macro_f1": "tweets, macro-F1",
    "phrasebank_accuracy": "PhraseBank, accuracy",
    "phrasebank_macro_f1": "PhraseBank, macro-F1",
    "twitter_accuracy,_text_to_text": "tweets, accuracy, text to text",
    "twitter_macro_f1,_text_to_text": "tweets, macro-F1, text to text",
    "decoding": "with AMX",
    "decoding_without_amx": "without AMX",
    "finetuning": "bf16",
    "finetuning_fp32": "float32",
    "speed_ratio_dropout0": "speed without dropout, ours / stock",
    "speed_ratio_dropout01": "speed with dropout 0.1, ours / stock",
    "gemm_fraction": "matrix products alone, as a share of our step without dropout",
    "products_s": "matrix products alone, seconds",
    "tokens_per_s": "tokens a second, ours",
    "peer_tokens_per_s": "tokens a second, stock",
    "peak_mb": "peak memory, MB",
    "peer_peak_mb": "peak memory of stock, MB",
    "mfu": "share of the peak of its products (MFU), ours",
    "peer_mfu": "share of the peak of its products (MFU), stock",
    "cache_ratio": "cache size, standard / slim",
    "speed_ratio_b64": "speed, batch 64, bf16, slim / standard",
    "speed_ratio_b1": "speed, batch 1, bf16, slim / standard",
    "speed_ratio_b64_fp32": "speed, batch 64, float32, slim / standard",
    "speed_ratio_b1_fp32": "speed, batch 1, float32, slim / standard",
    "stock_ratio_b64": "speed, batch 64, bf16, slim / stock transformers",
    "stock_ratio_b1": "speed, batch 1, bf16, slim / stock transformers",
    "stock_ratio_b64_fp32": "speed, batch 64, float32, slim / stock transformers",
    "stock_ratio_b1_fp32": "speed, batch 1, float32, slim / stock transformers",
    "error_ratio_bf16": "error in bf16, slim / standard",
    "speed_ratio_pad512": "speed, packed / padded to 512",
    "speed_ratio_bucketed": "speed, packed / padded in buckets of length",
    "speed_ratio_sorted": "speed, packed / padded in batches sorted by length",
    "real_token_fraction": "real tokens in packed rows",
}


def number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(number(part) for part in value)
    if isinstance(value, float):
        size = abs(value)
        return f"{value:,.0f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3f}" if size >= 0.1 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def words(key: str) -> str:
    """`minutes_to_4_5` is "minutes to 4.5"."""
    for name in (key, re.sub(r"^(mini|small)(_further)?_", "", key)):  # a set is called alike from whichever model
        if name in TITLES:
            return TITLES[name]
    return re.sub(r"(?<=\d)_(?=\d)", ".", key).replace("_", " ")


def scalars_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row for each single value, if there are any, and one column a result; of several each is named."""
    single = [{key: value for key, value in result.items() if not isinstance(value, Mapping | list)} for result in results.values()]
    keys = [key for key in dict.fromkeys(key for values in single for key in values) if key not in UNSHOWN]

    def cell(values: Mapping[str, Any], key: str) -> str:
        return ABSENT if key not in values else "not reached" if values[key] is None else number(values[key])

    lines = [f"| {words(key)} | {' | '.join(cell(values, key) for values in single)} |" for key in keys]
    title = f"| | {' | '.join(map(words, results))} |" if len(results) > 1 else "| | |"
    return [title, "|---|" + "---:|" * len(results), *lines] if lines else []


def cases_table(result: Mapping[str, Any]) -> list[str]:
    """One row a measure and one column a case, for measures such as `{"quarter": 1.2, "half": 2.3}` that share cases."""
    plain = {k: v for k, v in result.items() if isinstance(v, Mapping) and all(isinstance(x, int | float) for x in v.values())}
    shared = [(k, v) for k, v in plain.items() if sum(not v.keys().isdisjoint(other) for other in plain.values()) > 1]
    if not shared:
        return []
    cases = list(dict.fromkeys(case for _, values in shared for case in values))
    rows = [f"| {words(key)} | {' | '.join(number(v[case]) if case in v else ABSENT for case in cases)} |" for key, v in shared]
    return ["", f"| | {' | '.join(words(case) for case in cases)} |", "|---|" + "---:|" * len(cases), *rows]


def models_table(models: list[Mapping[str, Any]]) -> list[str]:
    """One row a model, best macro-F1 first, with columns for the draws of the folds and for scores without texts of the training rows."""
    titles = MODEL_COLUMNS | {"by draw": "accuracy by draw", "one run": "accuracy of one run"} | OVERLAP_COLUMNS | COSTS
    rows = [model | {(part, key): model[part][key] for part, key in OVERLAP_COLUMNS if key in model.get(part, ())} for model in models]
    for row in rows:
        if "draws" in row:
            row["by draw"] = ", ".join(number(draw["accuracy"]) for draw in row["draws"])
        if len(row.get("runs", ())) > 1:
            row["one run"] = mean(run["accuracy"] for run in row["runs"])
    columns = [key for key in titles if any(key in row for row in rows)]
    lines = ["| model | " + " | ".join(titles[key] for key in columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in sorted(rows, key=lambda row: -row["macro_f1"]):
        lines.append(f"| {row['name']} | " + " | ".join(number(row[key]) if key in row else "" for key in columns) + " |")
    return lines


def details_table(models: list[Mapping[str, Any]]) -> list[str]:
    """What only a model that gives probabilities or writes has: calibration, free generation; and scores by length of the text."""
    rows = []
    for model in sorted(models, key=lambda model: -model["macro_f1"]):
        if "temperature" in model and "by_length" in model:
            runs = model.get("generated", ())
            written = [number(mean(run[key] for run in runs)) if runs else "" for key in ("accuracy", "invalid_rate")]
            calibrated = [number(model[key]) for key in ("ece", "ece_scaled", "temperature")]
            lengths = [f"{number(group['macro_f1'])} ({group['words']})" for group in model["by_length"]]
            rows.append(f"| {' | '.join([model['name'], *calibrated, *written, ', '.join(lengths)])} |")
    titles = ("model", "ECE", "ECE, scaled", "temperature", "accuracy as written", "not a label", "macro-F1 by words in the text")
    return ["", f"| {' | '.join(titles)} |", "|---|---:|---:|---:|---:|---:|---|", *rows] if rows else []


def comparisons_table(records: Mapping[str, Mapping[str, Any]], summary: bool = False) -> list[str]:
    """One column a comparison: scores of the models, and the paired differences between them; "–" where one was not judged.

    A `summary` has the differences of the pre-trained models from `SUMMARY_BASELINE` alone. The least behind the best stands first: by mean
    score, a model that was judged only where all score high would lead.
    """
    scores = [{model["name"]: model for model in record["models"]} for record in records.values()]
    best = [max(model["macro_f1"] for model in models.values()) for models in scores]

    def behind(name: str) -> float:
        return mean(top - models[name]["macro_f1"] for top, models in zip(best, scores, strict=True) if name in models)

    names = sorted(dict.fromkeys(name for models in scores for name in models), key=behind)
    paired = [{(pair["first"], pair["second"]): pair for pair in record["comparisons"]} for record in records.values()]
    pairs = [(first, second) for first in names for second in names if any((first, second) in found for found in paired)]
    pairs = [pair for pair in pairs if not summary or (pair[1] == SUMMARY_BASELINE and pair[0] != CONTROL)]
    rows = [[name, *(score(models.get(name)) for models in scores)] for name in names]
    differences = [[f"{first} over {second}", *(difference(found.get((first, second))) for found in paired)] for first, second in pairs]
    lines = []
    for title, cells in (("accuracy / macro-F1", rows), ("difference of accuracy, 95 %", differences)):
        lines += ["", f"| {title} | {' | '.join(map(words, records))} |", "|---|" + "---:|" * len(records)]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    return lines[1:]


def score(model: Mapping[str, Any] | None) -> str:
    return ABSENT if model is None else f"{number(model['accuracy'])} / {number(model['macro_f1'])}"


def difference(pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return ABSENT
    low, high = pair["accuracy_difference_ci95"]
    return f"{pair['accuracy_difference']:+.3f}, {low:+.3f} to {high:+.3f}"


def table(names: str, summary: bool = False) -> str:
    """The Markdown table of one results file, or of several comparisons, which can be a summary."""
    records = {name: json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in names.split()}
    if len(records) > 1 and all("models" in record for record in records.values()):
        return "\n".join([*comparisons_table(records, summary), ""])
    origins = [origin_of(record) for record in records.values()]
    if len(records) > 1:
        named = [f"{words(name)}: {origin}" for name, origin in zip(records, origins, strict=True)]
        return "\n".join([*scalars_table({name: record["result"] for name, record in records.items()}), "", "\n\n".join(named), ""])
    (record,) = records.values()
    result = record.get("result", record)
    if "models" in result:
        lines = models_table(result["models"]) + details_table(result["models"])
    else:
        lines = scalars_table({names: result}) + cases_table(result)
    return "\n".join([*lines, "", *origins, ""])


def origin_of(record: Mapping[str, Any]) -> str:
    """The command that makes a result again, its machine, and in what it was made otherwise."""
    return f"`{record['command']}`" + "".join(f"{mark} {record[key]}" for key, mark in (("machine", ","), ("note", ":")) if key in record)


def render(page: str) -> str:
    return BLOCK.sub(lambda block: block[1] + table(block[3], block[2] == "summary") + block[4], page)


def main() -> int:
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    stale = {name: new for name, old in pages.items() if (new := render(old)) != old}
    if "--check" in sys.argv:
        for name in stale:
            print(f"{name} does not show what results/ holds: run python -m benchmarks.readme", file=sys.stderr)
        return int(bool(stale))
    for name, new in stale.items():
        (ROOT / name).write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
