"""Whole runs in small: folders of pictures, settings for a few seconds, runs in forked processes, what they left."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
from safetensors.torch import load_file

import sana_tune
from sana_tune.config.load import Loaded, load
from sana_tune.data.cache import TensorCache
from sana_tune.watch.events import CacheProgress, Event
from sana_tune.watch.metrics import read as read_metrics
from tests.data.pictures import put

# A run of four steps over pictures of 32 px on nano that draws nothing: under a second.
SMALL: Mapping[str, Any] = {
    "pretrained_model_name_or_path": "nano",
    "resolution": 32,
    "caption_strategy": "textfile",
    "train_batch_size": 2,
    "max_train_steps": 4,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "device": "cpu",
    "seed": 11,
    "validation_disable": True,
    "report": False,
}
TIMES = ("step_s", "data_wait_s", "images_s", "memory_bytes")  # of the machine, not of what is trained


def pictures(
    folder: Path, count: int, size: tuple[int, int] = (32, 32), *, variants: int = 1, seed: int = 0, name: str = "p"
) -> Path:
    """`count` pictures of a size, no two alike, each with a caption file of `variants` lines. Answers the folder."""
    for number in range(count):
        lines = [f"{name} {number} of {folder.name}, line {line}" for line in range(variants)]
        put(folder, f"{name}{number:02}.png", *size, seed=1000 * seed + number, caption="\n".join(lines))
    return folder


def small_run(folder: Path, *datasets: Mapping[str, Any], **settings: Any) -> Loaded:
    """A run's settings, read from files that are written to `folder`: `SMALL`, and what is given here.

    datasets: entries of multidatabackend.json, whose id may be left out; none = the pictures of folder/pictures.
    The run's own folder is folder/output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"id": f"d{number}", **entry} for number, entry in enumerate(datasets)] or [
        {"id": "d0", "instance_data_dir": str(folder / "pictures")}
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(entries), encoding="utf-8")
    places = {"data_backend_config": str(folder / "multidatabackend.json"), "output_dir": str(folder / "output")}
    (folder / "config.json").write_text(json.dumps({**SMALL, **places, **settings}), encoding="utf-8")
    return load(folder / "config.json", {}, {})


def output_of(loaded: Loaded) -> Path:
    """The folder of a run."""
    return Path(loaded.config.train.output_dir)


# ---- what a run tells and leaves ----


@dataclass
class Heard:
    """A sink that keeps every event, and lets `then` act on each: send a signal, say."""

    then: Callable[[Event], None] = lambda event: None
    events: list[Event] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.then(event)

    def close(self) -> None:
        pass

    def of(self, *kinds: type) -> list[Any]:
        """The events of these kinds."""
        return [event for event in self.events if isinstance(event, kinds)]

    @property
    def encoded(self) -> dict[str, int]:
        """Items made for each cache; what had nothing to make is not named."""
        return {event.cache: event.done for event in self.of(CacheProgress) if event.total}


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Everything a checkpoint holds, flat: name → tensor or plain value. The manifest's hashes are left out."""
    found: dict[str, Any] = {}
    for part in ("transformer", "transformer_ema"):
        for file in sorted((checkpoint / part).glob("*.safetensors")):
            found |= {f"{part}/{name}": tensor for name, tensor in load_file(file).items()}
    found |= _flat("optimizer", torch.load(checkpoint / "optimizer.pt", weights_only=True))
    found |= _flat("progress", json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
    return found


def pipeline_of(output: Path) -> dict[str, bytes]:
    """The exported pipeline, file by file; the README names the run's folder and is left out."""
    folder = output / "pipeline"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "README.md"
    }


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times and memory."""
    lines = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def cache_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every item of the caches below a folder, its checksum verified: key → dtype, shape, bytes."""
    found = {}
    for place in sorted({path.parent for path in folder.rglob("shard-*.safetensors")}):
        cache = TensorCache(place)
        assert not cache.index.torn
        for key in cache.index.items:
            tensor = cache.get(key)
            found[f"{place.relative_to(folder)}/{key}"] = (str(tensor.dtype), tuple(tensor.shape), bytes_of(tensor))
    return found


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes: NaN equals NaN, and 0.0 is not -0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names whose values are not the same, tensors byte for byte."""
    return sorted(name for name in one.keys() | other.keys() if not _same(one.get(name), other.get(name)))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and bytes_of(one) == bytes_of(other)
    return type(one) is type(other) and bool(one == other)


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested mappings and lists as one mapping of paths."""
    if isinstance(value, Mapping):
        inner: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        inner = list(enumerate(value))
    else:
        return {name: value}
    return {path: leaf for key, each in inner for path, leaf in _flat(f"{name}/{key}", each).items()}


# ---- runs in processes of their own ----


@cache
def preload() -> None:
    """Import what runs import on their way, so that forks find it: it would take seconds in each of them."""
    from accelerate import Accelerator  # noqa: F401
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Model  # noqa: F401

    for module in walk_packages(sana_tune.__path__, "sana_tune."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


class Child:
    """A function in a fork of this process, which has torch loaded already; what it prints goes to `log`.

    It ends with 0, with what the function answers, or with 70 and its traceback in the log.
    """

    def __init__(self, function: Callable[[], Any], log: Path):
        self.log = log
        self._status: int | None = None
        preload()
        self._born_s = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. Those of torch and tokenizers are idle here, and the child
            # starts none of its own in torch.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._live(function)

    def _live(self, function: Callable[[], Any]) -> None:
        code = 70
        try:
            torch.set_num_threads(1)  # OpenMP's other threads did not survive the fork
            target = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
            code = function()
            code = code if isinstance(code, int) else 0
        except BaseException:  # noqa: BLE001  whatever it is: a fork must not go on as a second pytest
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    @property
    def running(self) -> bool:
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
        return self._status is None

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.running:
            os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Wait until it holds. AssertionError with what the child said when that comes not in time, or it ends."""
        while not condition():
            if not self.running:
                assert condition(), f"it ended with {self._status}\n{self}"
                return
            self._wait_a_bit(timeout_s)

    def wait(self, timeout_s: float = 120.0) -> int:
        """Its exit code, or minus the signal that killed it."""
        while self.running:
            self._wait_a_bit(timeout_s)
        assert self._status is not None
        return self._status

    def _wait_a_bit(self, timeout_s: float) -> None:
        if time.monotonic() > self._born_s + timeout_s:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"{timeout_s} s were not enough\n{self}")
        time.sleep(0.0005)

    def __repr__(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else "(no output)"


@contextmanager
def one_thread() -> Iterator[None]:
    """torch works with one thread in here, as it does in a `Child`: sums then have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ranks(count: int, function: Callable[[int], Any], folder: Path, **environ: str) -> list[Child]:
    """`function(rank)` in so many forks that a launcher seems to have started together; what rank n prints goes to
    folder/rank-n.txt. environ: further variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def life(rank: int) -> Any:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)  # this process was none of several
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", **environ)
        return function(rank)

    return [Child(partial(life, rank), folder / f"rank-{rank}.txt") for rank in range(count)]


def all_well(children: Sequence[Child], timeout_s: float = 120.0) -> None:
    """Wait for the children. AssertionError with what they said unless all end with 0."""
    codes = [child.wait(timeout_s) for child in children]
    assert not any(codes), "\n".join(f"{code}: {child}" for code, child in zip(codes, children, strict=True))
