"""What a measurement says about where it was made, and the memory that work takes."""

from __future__ import annotations

import gc
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def commit() -> str | None:
    """Return the commit of this tree, with ``-dirty`` if files differ; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def cpu_model() -> str:
    """Return what the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_mib(work: Callable[[], object]) -> float | None:
    """Run ``work`` and return by how much resident memory rose at most, MiB; None if not known.

    Linux alone can forget the peak of before. Memory that the process keeps from earlier work and
    uses again does not count: a lower bound.
    """
    gc.collect()
    if not _CLEAR.exists():
        return None
    _CLEAR.write_text("5", encoding="ascii")
    before = _status_kib("VmRSS")
    work()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
