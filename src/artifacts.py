"""What the stages hand to each other: folders with manifests, checked for damage and staleness when read.

Changed bytes or settings block a reader; changed code only warns, because most edits do not change what a stage makes.
"""

import hashlib
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from src.environment import installed_versions, machine
from src.profiles import Settings, artifacts_folder, settings_for
from src.stages import stage_of
from src.verified_folders import ArtifactError, atomic_folder, file_sha256, json_sha256, read_manifest, recover, verify_folder


@dataclass(frozen=True)
class Artifact:
    """A verified folder: where it lies, what its manifest says, and the digest that names its content."""

    name: str
    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        return content_digest(self.manifest)


def content_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what an artifact *is*: its files, settings and inputs, but not when or where it was made."""
    return json_sha256({key: manifest.get(key) for key in ("files", "settings", "inputs")})


@cache
def code_digest() -> str:
    """SHA-256 of the package's own source files, in name order."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def write_artifact(
    settings: Settings,
    name: str,
    *,
    inputs: Sequence[Artifact] = (),
    sources: Sequence[Mapping[str, Any]] = (),
    counts: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Write one artifact of a stage atomically, with its manifest.

    Args:
        settings: of this run; the sections of the stage and their overrides are recorded.
        name: an output of a stage in `src.stages.STAGES`.
        inputs: the artifacts that were read; their digests are recorded.
        sources: what `src.sources.describe_source` says of the raw files.
        counts: numbers worth keeping; read when the block ends, so it may be filled inside.

    Yields:
        The folder to write into.
    """
    stage = stage_of(name)
    manifest: dict[str, Any] = {
        "artifact": name,
        "producer": stage.notebook,
        "profile": settings.profile,
        "settings": {section: settings.section(section) for section in stage.sections},
        "overrides": stage_overrides(settings, stage.sections),
        "inputs": {artifact.name: artifact.digest for artifact in inputs},
        "sources": [dict(source) for source in sources],
        "packages": installed_versions(),
        "machine": machine(),
        "code": code_digest(),
    }
    with atomic_folder(artifacts_folder(settings.profile) / name, manifest) as folder:
        yield folder
        manifest |= {"counts": dict(counts or {}), "created": datetime.now(UTC).isoformat(timespec="seconds")}


def data_digest(sources: Sequence[Mapping[str, Any]]) -> str | None:
    """SHA-256 of the file that was read, or of the digests of several; None where nothing is a file (sample, Hub)."""
    digests = [source["sha256"] for source in sources if "sha256" in source]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def published_command(module: str, arguments: Sequence[str]) -> str:
    """A command line as readers may see it."""
    parts = (argument.rpartition("=") for argument in arguments)
    return shlex.join(["python", "-m", module, *(option + equals + published_value(value) for option, equals, value in parts)])


def published_value(value: str) -> str:
    """Of a path outside this project only its last part, which names the data."""
    outside = os.path.isabs(value) or Path(value).parts[:1] == ("..",)
    return Path(value).name if outside else value


def stage_overrides(settings: Settings, sections: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.overrides.items() if key.partition(".")[0] in sections}


def open_artifact(settings: Settings, name: str) -> Artifact:
    """Open an artifact for reading, after checking its bytes, its settings and those of everything it was made from.

    Raises:
        ArtifactError: missing, damaged or stale; names the notebook to run.
    """
    path = artifacts_folder(settings.profile) / name
    recover(path)
    cure = f"run {stage_of(name).notebook}"
    if not path.exists():
        raise ArtifactError(f"{path} is missing: {cure}")
    try:
        manifest = verify_folder(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}: {cure}") from None
    if reason := stale_reason(settings, name):
        raise ArtifactError(reason)
    if manifest["code"] != code_digest():
        warnings.warn(f"{path} was made by another version of the code: {cure} again if that matters", stacklevel=2)
    return Artifact(name, path, manifest)


def stale_reason(settings: Settings, name: str, *, exact: bool = False) -> str | None:
    """Why an artifact no longer fits, or None. Reads manifests only, up the whole chain of inputs that are present.

    A setting counts as changed when deriving it again from the profile and the overrides that the artifact was made
    with (and those of this run) gives another value; with `exact`, from the overrides of this run alone.
    """
    path = artifacts_folder(settings.profile) / name
    stage = stage_of(name)
    cure = f"run {stage.notebook}"
    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        return f"{error}: {cure}"
    try:
        made_with = {} if exact else manifest["overrides"]
        expected = settings_for(settings.profile, {**made_with, **stage_overrides(settings, stage.sections)})
    except ValueError as error:
        return f"{path} is stale ({error}): {cure}"
    for section in stage.sections:
        for key, value in expected.section(section).items():
            if (old := manifest["settings"].get(section, {}).get(key)) != value:
                return f"{path} is stale ({section}.{key} was {old!r}, is {value!r}): {cure}"
    for input_name, digest in manifest["inputs"].items():
        input_path = path.with_name(input_name)
        if not input_path.exists():
            continue  # a stage runs alone as long as what it reads itself is there
        if reason := stale_reason(settings, input_name, exact=exact):
            return reason
        if content_digest(read_manifest(input_path)) != digest:
            return f"{path} is stale ({input_path} has been made anew since): {cure}"
    return None


def sources_changed(manifest: Mapping[str, Any]) -> str | None:
    """Which local source file has other bytes than when it was read, or None. A file that is gone does not count."""
    for source in manifest["sources"]:
        path = Path(source.get("path") or "")
        if not path.is_file() or path.stat().st_mtime_ns == source.get("modified_ns"):
            continue
        if path.stat().st_size != source["bytes"] or file_sha256(path) != source["sha256"]:
            return f"{path} has changed"
    return None
