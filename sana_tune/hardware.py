"""What the machine has: GPUs as nvidia-smi tells them, and main memory. No torch, so that a check is quick."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sana_tune.errors import Problem

MIB = 2**20
TIMEOUT_S = 5.0
_QUERY = ["nvidia-smi", "--query-gpu=uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
# Limits of a container, in the two versions of Linux' control groups; "max" or an absurd number is none.
_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
# Limit, use and what the use consists of, in the two versions.
_CGROUP_USES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclass(frozen=True)
class Device:
    """A device that a run can use, with its memory in bytes: all of it, and what nobody uses now.

    kind: "cuda", "mps" or "cpu", as the setting `device` names them.
    """

    name: str
    total_bytes: int
    free_bytes: int
    kind: str = "cuda"


def no_fp16_on_cpu() -> Problem:
    """What is wrong with fp16 where there is no GPU."""
    return Problem("mixed_precision", "fp16 needs a GPU; the run is on a CPU", "use mixed_precision no")


def device_for(wanted: str) -> Device | None:
    """The device that the setting `device` means here, as torch would choose it; None when it is not seen.

    wanted: auto, cuda, mps or cpu. torch has the last word: it may be a build that knows no GPU.
    """
    ram = ram_bytes()
    if wanted == "cpu":
        return Device("CPU", ram, ram, "cpu")
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if wanted == "mps" or (wanted == "auto" and apple):
        return Device("Apple GPU", ram, ram, "mps") if apple else None
    found = gpus()
    if found:
        return found[0]
    return device_for("cpu") if wanted == "auto" else None


def gpus(environ: Mapping[str, str] | None = None) -> tuple[Device, ...]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES shows, in its order; none when nvidia-smi is not there or fails."""
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not _names(visible):
        return ()
    try:
        asked = subprocess.run(_QUERY, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    rows = [[field.strip() for field in line.split(",")] for line in asked.stdout.splitlines()]
    found = {row[0]: _device(row[1:]) for row in rows if len(row) == 4} if asked.returncode == 0 else {}
    shown = list(found) if visible is None else _chosen(_names(visible), list(found))
    return tuple(device for name in shown if (device := found[name]) is not None)


def _names(visible: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES up to the first that hides the rest, as CUDA reads it."""
    names: list[str] = []
    for name in (entry.strip() for entry in visible.split(",")):
        if not name or name.startswith("-"):
            break
        names.append(name)
    return names


def _chosen(names: Sequence[str], uuids: Sequence[str]) -> list[str]:
    """The GPUs that the entries name by number or by the beginning of their id; one that is none ends the list."""
    chosen: list[str] = []
    for name in names:
        if name.isdecimal():
            match = uuids[int(name)] if int(name) < len(uuids) else None
        else:
            match = next((uuid for uuid in uuids if uuid.startswith(name)), None)
        if match is None:
            break
        chosen.append(match)
    return chosen


def _device(fields: Sequence[str]) -> Device | None:
    """A GPU from name, total and free MiB. Chips that share the machine's memory tell no number: it is the RAM."""
    name, total, free = fields
    if total.isdecimal() and free.isdecimal():
        return Device(name, int(total) * MIB, int(free) * MIB)
    shared = ram_bytes()
    return Device(name, shared, shared) if "N/A" in total or "Not Supported" in total else None


def ram_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Main memory in bytes, or what a container may use of it; 0 where the system does not tell.

    cgroup: where the limits of control groups stand.
    """
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 0
    for name in _CGROUP_LIMITS:
        try:
            limit = (cgroup / name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            found = min(found, int(limit))
    return found


def free_ram_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Main memory that can be taken now without swapping, a container's limit regarded.

    cgroup: where the limits of control groups stand.
    """
    import psutil

    found = int(psutil.virtual_memory().available)
    for limit_name, used_name, stat_name in _CGROUP_USES:
        try:
            limit, used = ((cgroup / name).read_text(encoding="ascii").strip() for name in (limit_name, used_name))
            stat = (cgroup / stat_name).read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        if limit.isdecimal() and used.isdecimal():
            found = min(found, max(0, int(limit) - int(used) + _cached(stat)))
    return found


def _cached(stat: str) -> int:
    """Bytes of files that a control group's memory holds and would give up."""
    values = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    found = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(found) if found.isdecimal() else 0
