"""Run the five notebooks in order, skip what is current, and say what was made: `python -m src.pipeline run`.

Each stage runs in a kernel of its own, as it would in Jupyter, so that what is tested is what people open.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from src.artifacts import ArtifactError, sources_changed, stale_reason, verify_folder
from src.interruption import INTERRUPTED
from src.profiles import Settings, add_settings_options, artifacts_folder, parse_overrides, parse_value, settings_for
from src.source_locations import FileSource
from src.stages import STAGES, Stage
from src.verified_folders import json_sha256

ROOT = Path(__file__).parent.parent
SECONDS_TO_LEAVE = 120  # that a notebook has when it is asked to stop
# Options of `run` (and variables of `make run`) that stand for one setting.
OPTIONS = {
    "corpus": ("corpus.path", "articles: sample, hub, a Hub id, or a local file or folder"),
    "corpus_column": ("corpus.text_column", "column that holds the articles"),
    "max_documents": ("corpus.max_documents", "number of articles to read"),
    "labelled": ("labelled.path", "labelled sentences: sample, hub, a Hub id, or a local file or folder"),
    "validation": ("labelled.validation_path", "a published validation split, used as the test split"),
    "text_column": ("labelled.text_column", "column that holds the labelled sentences"),
    "label_column": ("labelled.label_column", "column that holds their labels"),
    "label_map": ("labelled.label_map", "meaning of the labels, e.g. 0=bearish,1=bullish,2=neutral"),
    "minutes": ("pretraining.max_minutes", "budget of pre-training"),
}


class StageError(RuntimeError):
    """A notebook stopped with an error."""


class ProgressRelay:
    """Shows the progress bars of a running notebook as one line here: in place on a terminal, now and then in a log."""

    def __init__(self, prefix: str, stream: TextIO = sys.stdout, log_seconds: float = 20.0) -> None:
        self.prefix, self.stream = prefix, stream
        self.seconds = 0.2 if stream.isatty() else log_seconds
        self.shown_at = time.monotonic()

    def write(self, text: str) -> None:
        bars = [part for part in re.split(r"[\r\n]", text) if "%|" in part or "it/s" in part]
        if bars and time.monotonic() - self.shown_at >= self.seconds:
            self.shown_at = time.monotonic()
            line = f"{self.prefix} {bars[-1].strip()}"
            self.stream.write(f"\r{line[:160]:<160}" if self.stream.isatty() else line + "\n")
            self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()


def reason_to_run(settings: Settings, stage: Stage) -> str | None:
    """Why a stage has to run, or None when all it makes is whole and current."""
    for name in stage.outputs:
        path = artifacts_folder(settings.profile) / name
        if not path.exists():
            return f"{path} is missing"
        try:
            manifest = verify_folder(path)
        except ArtifactError as error:
            return str(error)
        reason = stale_reason(settings, name, exact=True) or sources_changed(manifest) or file_added(settings, stage, manifest)
        if reason:
            return reason.partition(": run ")[0]
    return None


def file_added(settings: Settings, stage: Stage, manifest: Mapping[str, Any]) -> str | None:
    """Which data file has come into a folder since the artifact was made from it, or None."""
    read = {source.get("path") for source in manifest["sources"]}
    for section in map(settings.section, stage.sections):
        for path in (section.get("path"), section.get("validation_path")):
            if path and path != "sample" and (folder := Path(path).expanduser()).is_dir():
                for file in FileSource.open(folder).files:
                    if str(file) not in read:
                        return f"{file} is new"
    return None


def collapse_carriage_returns(text: str) -> str:
    """What a terminal shows in the end of a text in which a progress bar overwrote itself."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def joined_streams(outputs: list[Any]) -> list[Any]:
    """Outputs with consecutive pieces of one stream as one text: every step of a progress bar arrives as a piece of its own."""
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = collapse_carriage_returns(output.text)
    return joined


def tidy(notebook: Any) -> None:
    """Leave in an executed notebook only what a reader wants: final bars, no run bookkeeping, no widget state."""
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info") if key in notebook.metadata}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        if "outputs" in cell:
            cell.outputs = joined_streams(cell.outputs)


def sources_digest(notebook: Any) -> str:
    """SHA-256 of the code that a notebook's outputs came from, kept in its metadata: one that was edited since shows what it never did."""
    return json_sha256([cell.source for cell in notebook.cells if cell.cell_type == "code"])


def run_notebook(settings: Settings, stage: Stage, prefix: str) -> Path:
    """Execute one notebook into `artifacts/<profile>/notebooks/`.

    Raises:
        StageError: with the error of the cell in one line, and where the executed copy lies.
    """
    import nbformat
    import papermill
    from traitlets.config import Config

    copy = artifacts_folder(settings.profile) / "notebooks" / stage.notebook
    copy.parent.mkdir(parents=True, exist_ok=True)
    parameters: dict[str, Any] = {"PROFILE": settings.profile, "OVERRIDES": dict(settings.overrides)}
    if parameters == {"PROFILE": "sample", "OVERRIDES": {}}:
        parameters = {}  # the notebook's own defaults: nothing to inject
    relay = ProgressRelay(prefix)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a debugger's warning that readers of the notebook do not need
    try:
        papermill.execute_notebook(
            ROOT / stage.notebook,
            copy,
            parameters,
            cwd=ROOT,
            kernel_name="python3",
            progress_bar=False,
            stdout_file=relay,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else each kernel warns that it listens on localhost
            # One that is asked to stop may have to end an evaluation and to save before it leaves.
            config=Config(KernelManager={"shutdown_wait_time": SECONDS_TO_LEAVE}),
        )
    except papermill.PapermillExecutionError as error:
        raise StageError(f"{stage.notebook} stopped: {error.ename}: {error.evalue} (see {copy})") from None
    notebook = nbformat.read(copy, as_version=4)
    tidy(notebook)
    notebook.metadata["executed_sources"] = sources_digest(notebook)
    nbformat.write(notebook, copy)
    return copy


def run(settings: Settings, *, through: int = len(STAGES), force: bool = False, in_place: bool = False) -> list[dict[str, Any]]:
    """Run every stage up to number `through` that is not current, in order; returns one row a stage for the closing table."""
    rows = []
    for number, stage in enumerate(STAGES[:through], 1):
        prefix = f"[{number}/{len(STAGES)}] {stage.notebook}"
        reason = "asked for" if force else reason_to_run(settings, stage)
        started = time.monotonic()
        if reason is None:
            print(f"{prefix}: current, nothing to do", flush=True)
        else:
            print(f"{prefix}: running ({reason})", flush=True)
            if force:  # else training would find its finished run and have nothing to do
                for name in stage.outputs:
                    shutil.rmtree(artifacts_folder(settings.profile) / ".checkpoints" / name, ignore_errors=True)
            copy = run_notebook(settings, stage, prefix)
            print(f"{prefix}: done in {time.monotonic() - started:.0f} s", flush=True)
            if in_place:
                (ROOT / stage.notebook).write_bytes(copy.read_bytes())
        seconds = None if reason is None else time.monotonic() - started
        rows.append({"stage": stage, "seconds": seconds})
    return rows


def describe(manifest: Mapping[str, Any]) -> str:
    """The counts of an artifact in one line."""
    counts = manifest.get("counts", {})
    return ", ".join(
        f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in counts.items() if value is not None
    )


def print_summary(settings: Settings, rows: list[dict[str, Any]]) -> None:
    """The closing tables: what each stage made and where, and the scores of every model on the same test rows once all are done."""
    folder = artifacts_folder(settings.profile)
    print(f"\n{'made':<22}{'seconds':>8}  where and what")
    for row in rows:
        for name in row["stage"].outputs:
            manifest = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))
            seconds = "current" if row["seconds"] is None else f"{row['seconds']:.0f}"
            print(f"{name:<22}{seconds:>8}  {folder / name}: {describe(manifest)}")
    print(f"{'executed notebooks':<22}{'':>8}  {folder / 'notebooks'}")
    if rows[-1]["stage"] is not STAGES[-1]:
        return
    models = json.loads((folder / "text_to_text" / "comparison.json").read_text(encoding="utf-8"))["models"]
    width = 2 + max(len(model["name"]) for model in models)
    print(f"\n{'model':<{width}}{'accuracy':>9}{'macro-F1':>10}")
    for model in sorted(models, key=lambda model: -model["macro_f1"]):
        print(f"{model['name']:<{width}}{model['accuracy']:>9.3f}{model['macro_f1']:>10.3f}")


def settings_from(arguments: argparse.Namespace) -> Settings:
    overrides: dict[str, Any] = {}
    for option, (key, _) in OPTIONS.items():
        if value := getattr(arguments, option):
            overrides[key] = parse_value(value) if option in ("max_documents", "minutes") else value
    return settings_for(arguments.profile, overrides | parse_overrides(arguments.set))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m src.pipeline", description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run the notebooks that are not current")
    add_settings_options(run_parser, "sample")
    for option, (key, description) in OPTIONS.items():
        run_parser.add_argument(f"--{option.replace('_', '-')}", help=f"{description} ({key})")
    run_parser.add_argument("--through", type=int, choices=range(1, len(STAGES) + 1), default=len(STAGES), help="the last notebook to run")
    run_parser.add_argument("--force", action="store_true", help="run every stage again")
    run_parser.add_argument("--in-place", action="store_true", help="also replace the notebooks here by the executed ones")
    compare_parser = commands.add_parser("compare", help="cross-validate the models and the baselines on labelled sentences")
    if sys.argv[1:2] == ["compare"]:  # its options come with torch, which `run` does not need
        from src import compare

        compare.add_arguments(compare_parser)
        compare_parser.set_defaults(compare=compare.run)
    return top


def main() -> int:
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a notebook that trains is told, and saves
    try:
        if arguments.command == "compare":
            arguments.compare(arguments)
            return 0
        settings = settings_from(arguments)
        rows = run(settings, through=arguments.through, force=arguments.force, in_place=arguments.in_place)
        print_summary(settings, rows)
    except (StageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; run again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
