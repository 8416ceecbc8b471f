"""What holds for every test: no network, no GPU unless asked for, folders and settings of its own, fixed seeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"

# What the developer's shell may hold and a run would obey.
STEERING = (
    "CONFIG_PATH", "ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT", "MIXED_PRECISION", "TRAINING_NUM_PROCESSES",
    "TRAINING_NUM_MACHINES", "TRAINING_MACHINE_RANK", "TRAINING_DYNAMO_BACKEND", "MAIN_PROCESS_IP",
    "MAIN_PROCESS_PORT", "ACCELERATE_CONFIG_PATH", "ACCELERATE_EXTRA_ARGS", "ACCELERATE_USE_FSDP", "RANK", "WORLD_SIZE",
    "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VENV_PATH", "DISABLE_UPDATES", "SANA_TUNE_TORCH_INDEX",
    "HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "WANDB_API_KEY",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long counts: more seeds, more kills")
    parser.addoption("--gpu", action="store_true", help="let the tests see the GPU")


def pytest_configure(config: pytest.Config) -> None:
    """Settle the environment before a test module, and with it a library that reads it once, is imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores it, and hands that on
        signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tempfile.TemporaryDirectory(prefix="sana_tune-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    for name in STEERING:
        os.environ.pop(name, None)
    threads = str(_threads())
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, (str(OFFLINE), os.environ.get("PYTHONPATH")))),
        HF_HOME=f"{home.name}/huggingface",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_XET="1",  # it does not use Python's sockets, which are the ones that are blocked
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        WANDB_MODE="offline",
        WANDB_DIR=home.name,
        WANDB_SILENT="true",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        NO_PROXY="127.0.0.1,localhost",
    )
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.getoption("--full"):
        os.environ["SANA_TUNE_FULL"] = "1"
    for folder in (str(OFFLINE), str(ROOT)):  # ROOT: `import scripts.nano.draw` works from any folder
        if folder not in sys.path:
            sys.path.insert(0, folder)
    sys.modules.pop("sitecustomize", None)  # the machine's own, where it has one
    import sitecustomize

    sitecustomize.block()


def _threads() -> int:
    """Of OpenMP, for this process and those that it starts: the cores, shared among the workers that test beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, min(4, cores // beside))


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether the long counts were asked for (scripts/test.sh --full)."""
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture(scope="session")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built as pip would, but with the hatchling of this environment (no network)."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every test. torch is seeded where it is loaded, and not loaded for that."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
