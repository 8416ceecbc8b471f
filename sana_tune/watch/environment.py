"""What a run ran on, for its report: versions, device, system. Nothing that names a person, a host or a secret."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sana_tune import __version__
from sana_tune.hardware import Device, ram_bytes

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "torch-optimi", "numpy", "pillow",
    "safetensors", "tokenizers", "huggingface_hub",
)  # fmt: skip


def environment(device: Device | None, precision: str, processes: int = 1) -> dict[str, Any]:
    """Plain values for environment.json. device: where the run takes place, if that is known. precision: that of the
    computing: bf16, fp16 or no."""
    return {
        "sana_tune": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "ram_bytes": ram_bytes(),
        "device": device and {"name": device.name, "kind": device.kind, "memory_bytes": device.total_bytes},
        "processes": processes,
        "mixed_precision": precision,
        "libraries": {name: found for name in LIBRARIES if (found := _version(name)) is not None},
    }


def processor() -> str:
    """The processor's model name; what kind it is where the system tells no name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            named = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(named, "") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
