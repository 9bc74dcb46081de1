"""How full packed rows are over an epoch of pre-training: `python -m benchmarks.packing --targets 114 116`.

Best fit beside one text a row, plain concatenation and what no packing can exceed: the tokens of one side may need more rows than those of
the other fill. Reads the `tokenizer` and `pretraining_dataset` artifacts of a profile. The last line is one JSON object.
"""

import argparse
import json
import time

from benchmarks.pretraining_recipe import Corpus
from src import profiles
from src.inspection import compare_packing
from src.pretraining_batches import PretrainingBatches
from src.span_corruption import corrupted_lengths


def most_possible(source: PretrainingBatches) -> float:
    """Share of encoder positions that real tokens fill if rows are as few as the fuller side allows."""
    inputs, targets = (lengths.sum() for lengths in corrupted_lengths(source.windows(0)[2], *source.noise))
    rows = max(inputs / source.settings.inputs_length, targets / source.settings.targets_length)
    return float(inputs / source.settings.inputs_length / rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[114, 116], help="decoder tokens of a row")
    profiles.add_settings_options(parser, "mini")
    options = parser.parse_args()
    settings = profiles.settings_for(options.profile, profiles.parse_overrides(options.set))
    corpus = Corpus.of(settings)
    result: dict[str, dict[str, float]] = {}
    for targets in options.targets:
        overrides = {**settings.overrides, "pretraining.targets_length": targets, "pretraining.labelled_share": 0.0}
        own = profiles.settings_for(options.profile, overrides).pretraining
        source = PretrainingBatches(corpus.train, corpus.tokenizer, own)
        for name, figures in compare_packing(corpus.train, corpus.tokenizer, own).items():
            for measure in ("encoder positions used", "rows"):
                result.setdefault(f"{name}: {measure}", {})[f"{targets} targets"] = figures[measure]
        result.setdefault("the most that any packing can use", {})[f"{targets} targets"] = most_possible(source)
        started = time.perf_counter()
        source.epoch(0)
        result.setdefault("seconds to plan the epoch by best fit", {})[f"{targets} targets"] = time.perf_counter() - started
    for name, figures in result.items():
        print(name, figures)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
