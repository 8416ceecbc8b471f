"""What a run ran on: versions and devices, and nothing that names a person or a host."""

from __future__ import annotations

import getpass
import json
import socket
from importlib.metadata import version
from pathlib import Path

from sana_tune.hardware import Device
from sana_tune.watch.environment import environment, processor


def test_versions_and_devices_are_told():
    found = environment(Device("NVIDIA H100", 80 * 2**30, 70 * 2**30), "bf16", 2)
    assert found["libraries"]["torch"] == version("torch") and len(found["libraries"]) >= 8
    assert found["device"] == {"name": "NVIDIA H100", "kind": "cuda", "memory_bytes": 80 * 2**30}
    assert (found["mixed_precision"], found["processes"], processor()) == ("bf16", 2, found["processor"])
    assert environment(None, "no")["device"] is None


def test_nothing_names_a_host_or_a_home():
    text = json.dumps(environment(None, "no"))
    for secret in (
        socket.gethostname(),
        str(Path.home()),
        getpass.getuser() if getpass.getuser() != "root" else "/root",
    ):
        assert len(secret) < 3 or secret not in text
