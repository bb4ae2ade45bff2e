"""Which machine and which versions a result was made with."""

import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Iterable


def processor() -> dict:
    """Return the CPU's model, where the system tells it, and the number of cores."""
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {"cpu": model[1] if model else platform.processor(), "cores": os.cpu_count()}


def host() -> dict:
    """Return Python's version, the architecture and the processor."""
    return {"python": platform.python_version(), "machine": platform.machine(), **processor()}


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return each package's installed version, None where it is not installed."""
    return {name: _version(name) for name in packages}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
