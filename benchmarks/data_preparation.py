"""Time and memory of stage 1 on a quarter, a half and the whole of a corpus: `python -m benchmarks.data_preparation --corpus PATH`.

Each size runs in a process of its own, from reading to the written token ids, near-duplicate detection and the training
of the tokenizer included. Peak memory is the resident set of that process and of its largest child. Last comes one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from src.config import CorpusSettings
from src.pretraining_dataset import collect_documents, write_pretraining_dataset
from src.sources import SourceError, count_articles
from src.tokenizer import train_tokenizer

PARTS = {"quarter": 4, "half": 2, "whole": 1}
BYTES_OF_MAXRSS = 1 if sys.platform == "darwin" else 1024


def prepare(corpus: str, documents: int) -> dict:
    """Run the stage on some documents and measure it: seconds of each step, words, peak memory in MB (10^6 bytes)."""
    settings = CorpusSettings(path=corpus, max_documents=documents)
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer_folder, dataset_folder = Path(folder) / "tokenizer", Path(folder) / "pretraining_dataset"
        tokenizer_folder.mkdir()
        dataset_folder.mkdir()
        collected = collect_documents(settings)
        lap("collect")
        train_tokenizer(collected.sample("train", settings.tokenizer_documents), tokenizer_folder, settings.vocab_size, settings.lowercase)
        lap("tokenizer")
        report = write_pretraining_dataset(collected, tokenizer_folder, dataset_folder)
        lap("write")
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * BYTES_OF_MAXRSS
    return {"articles": documents, "words": report["words"], "counts": report["counts"], "steps": seconds, "peak_mb": round(peak / 1e6)}


def in_fresh_process(corpus: str, documents: int) -> dict:
    """`prepare` in a new interpreter; `seconds` counts from its start to its end."""
    command = [sys.executable, "-m", "benchmarks.data_preparation", "--corpus", corpus, "--documents", str(documents)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
    if process.wait():
        raise SystemExit(process.returncode)
    return {**json.loads(line), "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="sample, hub, a Hub id, or a local file or folder")
    parser.add_argument("--documents", type=int, help="measure only this many, in this process")
    arguments = parser.parse_args()
    try:
        if arguments.documents:
            print(json.dumps(prepare(arguments.corpus, arguments.documents)))
            return
        articles = count_articles(arguments.corpus)
    except SourceError as error:
        raise SystemExit(str(error)) from None
    runs = {name: in_fresh_process(arguments.corpus, articles // share) for name, share in PARTS.items()}
    result = {
        "articles": articles,
        "words_per_s": round(runs["whole"]["words"] / runs["whole"]["seconds"]),
        "seconds": {name: run["seconds"] for name, run in runs.items()},
        "peak_mb": {name: run["peak_mb"] for name, run in runs.items()},
        "steps": {name: run["steps"] for name, run in runs.items()},
        "counts": runs["whole"]["counts"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
