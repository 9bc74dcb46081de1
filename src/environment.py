"""What a notebook runs in: install what is missing, then say which versions, device and number format are in use.

An installed torch is never replaced (on Colab it matches the driver): pip is told to keep it as it is.
"""

import ctypes
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
PACKAGES = (  # whose versions are shown, and kept with every result
    "torch", "transformers", "datasets", "sentencepiece", "tokenizers", "peft", "bitsandbytes", "accelerate", "scikit-learn", "numpy"
)  # fmt: skip
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h

# transformers imports peft, which imports bitsandbytes, which warns that an optional kernel is absent; nothing here uses that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Version of each of `PACKAGES` that is installed."""
    return {package: version for package in PACKAGES if (version := installed(package))}


def missing_requirements(requirements: Path = REQUIREMENTS) -> list[str]:
    """Lines of a requirements file whose package is absent or older than its floor; torch counts only when absent."""
    from packaging.requirements import Requirement

    missing = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        requirement = Requirement(text)
        version = installed(requirement.name)
        if version is None or (requirement.name != "torch" and not requirement.specifier.contains(version, prereleases=True)):
            missing.append(text)
    return missing


def install(requirements: list[str]) -> None:
    """Install with pip, holding an installed torch at its version.

    Raises:
        RuntimeError: pip failed; carries pip's last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        torch_version = installed("torch")
        constraints.write_text(f"torch=={torch_version}\n" if torch_version else "")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *requirements]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"pip could not install {', '.join(requirements)}: {reason}")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; having ipykernel imported does not make it one."""
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and kernel.IPKernelApp.initialized()


def keep_freed_memory() -> None:
    """Tell glibc to hold on to freed memory. A training step on a CPU frees and asks again for gigabytes, and by default the
    system takes each large block back and hands it out zeroed, page by page: 15 % of a step. Other systems are left as they are."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 64 << 20)


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread" + "s" * (threads != 1)


def machine() -> str:
    """What results were made on: the GPU if there is one, the processor, and the cores that this process may use."""
    import torch

    from src.precision import processor

    name = processor().get("model name", platform.processor())
    gpu = [torch.cuda.get_device_name(0)] if torch.cuda.is_available() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([*gpu, name, f"{cores} core" + "s" * (cores != 1)])


def report() -> str:
    """A plain table of versions, device and number format."""
    from src.precision import best_precision

    rows = [("python", platform.python_version()), *((name, installed(name) or "absent") for name in PACKAGES)]
    rows += [("device", device_name()), ("precision", best_precision())]
    return "\n".join(f"{name:<14} {value}" for name, value in rows)


def prepare() -> None:
    """First call of every notebook: install what is missing, quieten libraries, print the table."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked after tokenizers were used
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if missing := missing_requirements():
        print(f"installing {', '.join(missing)} ...")
        install(missing)
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars are widgets, which a saved notebook cannot show
    print(report())
