"""Run a benchmark and keep its last line under `results/`, with the command, the machine and the versions.

python -m benchmarks.record decoding --cases headline               ->  results/decoding.json
python -m benchmarks.record --as finetuning_fp32 finetuning         ->  results/finetuning_fp32.json
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from src.artifacts import published_command
from src.environment import installed_versions, machine

RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__.partition("\n")[0])
    parser.add_argument("--as", dest="kept_as", help="name of the results file, where it is not the benchmark's")
    parser.add_argument("name", help="of a benchmark")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of that benchmark")
    options = parser.parse_args()
    name, arguments = options.name, options.arguments
    process = subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}", *arguments], stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    if process.wait():
        print(f"error: benchmarks.{name} failed: nothing was recorded", file=sys.stderr)
        return 1
    record = {
        "command": published_command(f"benchmarks.{name}", arguments),
        "date": date.today().isoformat(),
        "machine": machine(),
        "packages": installed_versions(),
        "result": json.loads(last),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.kept_as or name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
