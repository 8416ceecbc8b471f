"""Hardware: what nvidia-smi tells, with a stand-in for it on PATH, and main memory."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from sana_tune import hardware
from sana_tune.hardware import MIB, Device, device_for, gpus, ram_bytes

TWO = """\
GPU-aaaa1111, NVIDIA GeForce RTX 4090, 24564, 24000
GPU-bbbb2222, NVIDIA H100 80GB HBM3, 81559, 81000
"""
SMALL, LARGE = (
    Device("NVIDIA GeForce RTX 4090", 24564 * MIB, 24000 * MIB),
    Device("NVIDIA H100 80GB HBM3", 81559 * MIB, 81000 * MIB),
)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts an nvidia-smi on PATH: a script that writes down how it was called and answers this."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def answers(text: str, then: str = "exit 0") -> Path:
        script, calls = tmp_path / "nvidia-smi", tmp_path / "calls"
        script.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\ncat <<END\n{text}END\n{then}\n', encoding="utf-8")
        script.chmod(0o755)
        return calls

    return answers


def test_name_and_memory_are_read(smi):
    calls = smi(TWO)
    assert gpus({}) == (SMALL, LARGE)
    assert "--query-gpu=uuid,name,memory.total,memory.free" in calls.read_text()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", [SMALL]),
        ("1", [LARGE]),
        ("1, 0", [LARGE, SMALL]),
        ("GPU-bbbb", [LARGE]),
        ("1,7,0", [LARGE]),  # one that is not there hides those after it
        ("0,-1,1", [SMALL]),
        ("MIG-12", []),  # a slice of a GPU: how large it is, is not told here
    ],
)
def test_cuda_visible_devices_is_respected(visible, expected, smi):
    smi(TWO)
    assert gpus({"CUDA_VISIBLE_DEVICES": visible}) == tuple(expected)


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_no_visible_device_asks_nobody(visible, smi):
    calls = smi(TWO)
    assert gpus({"CUDA_VISIBLE_DEVICES": visible}) == () and not calls.exists()


def test_the_environment_is_the_processs_own_by_default(smi, monkeypatch):
    smi(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus() == (LARGE,)


@pytest.mark.parametrize(
    ("text", "then"),
    [
        ("NVIDIA-SMI has failed because it could not communicate with the driver\n", "exit 9"),
        (TWO, "exit 1"),
        ("", "exit 0"),
        ("No devices were found\n", "exit 0"),
    ],
)
def test_a_failure_is_no_gpu(text, then, smi):
    smi(text, then)
    assert gpus({}) == ()


def test_without_nvidia_smi_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus({}) == ()


def test_it_is_not_waited_for_long(smi, monkeypatch):
    smi(TWO, "exec sleep 30")
    monkeypatch.setattr(hardware, "TIMEOUT_S", 0.2)
    begin = time.monotonic()
    assert gpus({}) == () and time.monotonic() - begin < 5


def test_memory_shared_with_the_machine_is_the_ram(smi):
    smi("GPU-c, NVIDIA GB10, [N/A], [N/A]\nGPU-d, Broken, [Unknown Error], 3\n")
    assert gpus({}) == (Device("NVIDIA GB10", ram_bytes(), ram_bytes()),)


def test_main_memory_is_the_machines_or_the_containers(tmp_path):
    whole = ram_bytes(tmp_path)
    assert 100 * MIB < whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("max\n")
    assert ram_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("104857600\n")
    assert ram_bytes(tmp_path) == 100 * MIB
    old = tmp_path / "old"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert ram_bytes(old) == whole


def test_the_device_of_a_run_is_the_one_asked_for(smi, monkeypatch):
    smi(TWO)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device_for("auto") == device_for("cuda") == SMALL and SMALL.kind == "cuda"
    assert device_for("cpu") == Device("CPU", ram_bytes(), ram_bytes(), "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_for("cuda") is None
    if platform.system() == "Linux":
        assert device_for("mps") is None and device_for("auto") == device_for("cpu")


def test_free_main_memory_is_what_a_container_leaves(tmp_path):
    free = hardware.free_ram_bytes(tmp_path)
    assert 0 < free <= ram_bytes(tmp_path)
    for name, text in (
        ("memory.max", "1000000"),
        ("memory.current", "600000"),
        ("memory.stat", "anon 1\ninactive_file 50000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert hardware.free_ram_bytes(tmp_path) == 450_000, "files that are cached would be given up"
    (tmp_path / "memory.max").write_text("max")
    assert hardware.free_ram_bytes(tmp_path) > 1_000_000
