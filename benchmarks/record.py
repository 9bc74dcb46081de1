"""Run a benchmark and keep its last line under `results/`, with the command, the machine and the versions.

python -m benchmarks.record decoding --cases headline      ->  results/decoding.json
"""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from src.artifacts import installed_versions, published_command
from src.environment import machine

RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m benchmarks.record NAME [arguments of that benchmark]", file=sys.stderr)
        return 2
    name, arguments = sys.argv[1], sys.argv[2:]
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
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
