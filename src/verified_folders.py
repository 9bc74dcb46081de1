"""Folders that are either whole or not there: atomic writes and verification, for artifacts and checkpoints alike.

A folder is written to a temporary sibling, synced, hashed, given `manifest.json` last, and renamed into place, so a
reader sees the old folder or the new one. The price is that every file is read once more to hash it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class ArtifactError(ValueError):
    """A folder that is missing, damaged or stale, or that could not be written."""


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value; NumPy scalars are written as the numbers they are."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=lambda scalar: scalar.item()).encode()


def json_sha256(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file that was read."""
    stat = path.stat()
    return {"path": str(path), "bytes": stat.st_size, "sha256": file_sha256(path), "modified_ns": stat.st_mtime_ns}


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(target: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Write a folder that appears at `target` whole or not at all.

    Args:
        target: where the folder shall lie; what lies there stays until the new one is complete.
        manifest: written as `manifest.json` with `files` (bytes and SHA-256 of each) and its own `sha256` added.

    Yields:
        The temporary sibling to write into.

    Raises:
        ArtifactError: the disk is full; says how much was written and what is free.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    remove_abandoned(target.parent, target.name)
    folder = target.with_name(f".{target.name}.new-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        complete = {**manifest, "files": {name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for name, p in files.items()}}
        complete["sha256"] = json_sha256(complete)
        text = json.dumps(complete, indent=1, ensure_ascii=False, default=lambda scalar: scalar.item())
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        for path in (*files.values(), folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
            sync(path)
        publish(folder, target)
    except BaseException as error:
        written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
        shutil.rmtree(folder, ignore_errors=True)
        if is_disk_full(error):
            raise ArtifactError(disk_full_message(target, written)) from error
        raise


def publish(folder: Path, target: Path) -> None:
    """Put a complete folder in the place of the old one. A kill between the two renames is mended by `recover`."""
    previous = previous_of(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    folder.rename(target)
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def previous_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def recover(target: Path) -> None:
    """Bring the old folder back if a writer was killed after moving it aside and before the new one took its place."""
    if not target.exists() and previous_of(target).exists():
        with suppress(FileNotFoundError):  # another process of this run was first
            previous_of(target).rename(target)


def recover_all(parent: Path, names: str) -> None:
    """`recover` for every target of these names (a glob pattern); what was moved aside for a target that is there goes."""
    for previous in parent.glob(f".{names}.previous"):
        target = previous.with_name(previous.name.removeprefix(".").removesuffix(".previous"))
        recover(target)
        shutil.rmtree(previous, ignore_errors=True)


def remove_abandoned(parent: Path, names: str) -> None:
    """Remove temporary folders for targets of these names (a glob pattern) whose writer no longer lives.

    This process's own count as abandoned: it writes one at a time.
    """
    for folder in parent.glob(f".{names}.new-*"):
        pid = int(folder.name.rpartition("-")[2])
        if pid == os.getpid() or not process_lives(pid):
            shutil.rmtree(folder, ignore_errors=True)


def process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_disk_full(error: BaseException) -> bool:
    # safetensors reports a full disk in words, without errno.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def disk_full_message(target: Path, written: int) -> str:
    free = shutil.disk_usage(target.parent).free
    before = f"{target} is kept as it was" if target.exists() else "nothing was left behind"
    return f"disk full while writing {target}: {written:,} bytes written, {free:,} free now, {before}: free some space and run again"


def read_manifest(path: Path) -> dict[str, Any]:
    """Read `manifest.json` and check that it is whole and unedited; its files are not looked at."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        recorded = manifest.pop("sha256")
    except FileNotFoundError:
        raise ArtifactError(f"{path} has no {MANIFEST}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ArtifactError(f"{path / MANIFEST} is damaged") from None
    if json_sha256(manifest) != recorded:
        raise ArtifactError(f"{path / MANIFEST} was changed after it was written")
    return manifest


def verify_folder(path: Path) -> dict[str, Any]:
    """Check every byte of a folder against its manifest.

    Returns:
        The manifest.

    Raises:
        ArtifactError: names the file that is missing or damaged.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"] or file_sha256(file) != expected["sha256"]:
            raise ArtifactError(f"{file} is damaged: its bytes are not the ones that were written")
    return manifest
