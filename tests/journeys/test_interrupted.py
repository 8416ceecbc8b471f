"""Ctrl-C and SIGTERM in each long operation: the exit code says so, nothing is lost, and the next start goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from sana_tune.cli.main import exit_code
from sana_tune.run import run
from sana_tune.train import folders
from tests.journeys.kit import (
    Child,
    cache_of,
    differences,
    metrics_of,
    pictures,
    pipeline_of,
    small_run,
    state_of,
)

SETTINGS: dict[str, Any] = {
    "max_train_steps": 2,
    "checkpoint_step_interval": 1,
    "use_ema": True,
    "rehearsal": "on",
    "write_batch_size": 2,
    "vae_batch_size": 2,
    "validation_disable": False,
    "validation_prompt": "a dot",
    "validation_resolution": "32",
    "validation_num_inference_steps": 1,
    "validation_disable_unconditional": True,
    "validation_step_interval": 1,
    "disable_benchmark": True,
}


# ---- at which moment ----


def at_file(part: str, nth: int = 1) -> Callable[[Callable[[], None]], None]:
    """When Python opens, makes or renames the nth file with such a path."""

    def install(strike: Callable[[], None]) -> None:
        turns = count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.mkdir", "os.rename") and part in str(arguments[0]) and next(turns) == nth:
                strike()

        sys.addaudithook(hook)

    return install


def at_module(kind: str, nth: int = 1) -> Callable[[Callable[[], None]], None]:
    """When a module of that class is called for the nth time."""

    def install(strike: Callable[[], None]) -> None:
        turns = count(1)

        def hook(module: Any, inputs: Any) -> None:
            if type(module).__name__ == kind and next(turns) == nth:
                strike()

        register_module_forward_pre_hook(hook)

    return install


@dataclass(frozen=True)
class Moment:
    """A moment of a run, and the checkpoint that must be there when it has been stopped; None = none."""

    install: Callable[[Callable[[], None]], None]
    step: int | None


# The transformer is called three times in the rehearsal (micro-batch, picture, picture of the average), then once in a
# step and twice in a validation.
MOMENTS = {
    "survey": Moment(at_file("pictures/p02.png"), None),
    "text cache": Moment(at_module("Gemma2Model", 2), None),
    "latent cache": Moment(at_module("Encoder", 2), None),
    "loading": Moment(at_file("transformer/config.json", 2), None),
    "rehearsal": Moment(at_module("SanaTransformer2DModel", 1), None),
    "training": Moment(at_module("SanaTransformer2DModel", 4), 1),
    "validation": Moment(at_module("SanaTransformer2DModel", 5), 1),
    "saving": Moment(at_file("/.checkpoint-1.tmp-", 3), 1),
    "export": Moment(at_file("/.pipeline.", 3), 2),
}
ELSEWHERE = ("text cache", "latent cache", "training")  # test_caches, test_resume


def start(folder: Path, before: Callable[[], None] = lambda: None) -> Child:
    """The command line in a process of its own, which does `before` first."""

    def life() -> int:
        before()
        return exit_code(["train", "--config", str(folder / "config.json")])

    return Child(life, folder / "console.txt")


def result(output: Path) -> dict[str, Any]:
    """All that must be the same in the end."""
    found = {f"line {number}": line for number, line in enumerate(metrics_of(output))}
    names = sorted(path.name for path in output.iterdir())
    state = state_of(output / "checkpoint-2")
    return {**found, **state, **pipeline_of(output), **cache_of(output / "cache"), **drawn(output), "names": names}


def drawn(output: Path) -> dict[str, bytes]:
    """The validation pictures, without the sheets made of them."""
    return {path.name: path.read_bytes() for path in (output / "validation_images").glob("*[0-9a].png")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The pictures, and what a run comes to that nobody stops. In this process: forks have everything imported."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pictures(folder / "pictures", 5)
    run(small_run(folder, **SETTINGS))
    return folder / "pictures", result(folder / "output")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_signal_ends_it_cleanly_and_it_goes_on(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, Any]], name: str, number: signal.Signals, full: bool
):
    if not full and (name in ELSEWHERE or (list(MOMENTS).index(name) % 2 == 0) != (number is signal.SIGINT)):
        pytest.skip("the other signal, and moments that other journeys are stopped at, are for --full")
    shown, expected = undisturbed
    small_run(tmp_path, {"instance_data_dir": str(shown)}, **SETTINGS)
    moment, output = MOMENTS[name], tmp_path / "output"
    child = start(tmp_path, lambda: moment.install(lambda: os.kill(os.getpid(), number)))
    assert child.wait() == 128 + number, child
    told = str(child)
    assert f"stopped by signal {int(number)}" in told and "Traceback" not in told
    held = folders.find(output, "latest") if output.exists() else None
    assert (held and held.step) == moment.step
    assert held is None or folders.damage(held) == []
    child = start(tmp_path)
    assert child.wait() == 0, child
    # A validation that was stopped is not drawn again; all that is trained, told and kept is as if nothing had been.
    missing = expected.keys() - result(output).keys()
    assert missing <= {name for name in drawn(shown.parent / "output") if name.startswith(f"step_{moment.step}_")}
    assert set(differences(expected, result(output))) == missing
