"""Trackers of experiments: wandb and TensorBoard, fed on a thread of their own and imported only when asked for.

Steps are logged under the names of metrics.jsonl, measured values under their own, pictures as validation/<prompt>.
A tracker that fails is told once and hears no more; the run goes on.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sana_tune.errors import Problem
from sana_tune.log import log
from sana_tune.watch.background import Worker
from sana_tune.watch.events import Event, Failed, Finished, Measured, Started, Stepped, Validated
from sana_tune.watch.messages import picture_name
from sana_tune.watch.metrics import line_of

WAITING = 10_000  # steps and pictures that may wait for a slow tracker
FINISH_S = 60.0  # for a tracker to take what waits, at the end
Pictures = Sequence[tuple[str, Path]]  # name, file


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run. settings: plain and without secrets. id: the same when the run is resumed."""

    project: str
    name: str
    id: str
    folder: Path
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """One tracker. All is called on one thread; what it raises ends it."""

    def start(self, info: RunInfo, step: int) -> None:
        """Open the run, or go on with it after `step`."""
        ...

    def log(self, step: int, values: Mapping[str, float], pictures: Pictures = ()) -> None: ...

    def finish(self, code: int) -> None:
        """Close the run: 0 finished, 1 failed, 255 stopped."""
        ...


class TrackerSink:
    """Feeds one tracker with the events of a run."""

    def __init__(self, name: str, tracker: Tracker, info: RunInfo, finish_s: float = FINISH_S):
        self._name, self._tracker, self._info, self._finish_s = name, tracker, info, finish_s
        self._worker = Worker(name, WAITING, self._failed)
        self._started = self._over = False
        self._lost = 0
        self._code = 255

    def emit(self, event: Event) -> None:
        """Queue what the tracker gets; takes microseconds."""
        match event:
            case Started(progress=progress):
                self._begin(progress.step)
            case Stepped(progress=progress):
                values = {name: value for name, value in line_of(event).items() if isinstance(value, (int, float))}
                if event.memory_bytes is not None:
                    values["memory_gb"] = round(event.memory_bytes / 1e9, 3)
                self._put(progress.step, {name: value for name, value in values.items() if name != "step"})
            case Measured(progress=progress, values=found):
                self._put(progress.step, dict(found))
            case Validated(progress=progress, files=files) if files:
                pictures = [(f"validation/{picture_name(file)}", Path(file)) for file in files]
                self._put(progress.step, {}, pictures)
            case Finished():
                self._code = 0
            case Failed():
                self._code = 1

    def close(self) -> None:
        """Let the tracker take what waits and close its run, for a while."""
        if not self._started:
            return
        code = self._code
        self._worker.put(lambda: None if self._over else self._tracker.finish(code))
        if not self._worker.finish(self._finish_s) and not self._over:
            log.warning("%s has not taken everything after %.0f s; what it has is in %s", self._name, self._finish_s,
                        self._info.folder)  # fmt: skip
        if self._lost:
            log.warning("%s was too slow: %d steps are not in it (metrics.jsonl has them)", self._name, self._lost)

    def _begin(self, step: int) -> None:
        if not self._started:  # a run that went back to a checkpoint starts again, and is one run
            self._started = True
            self._worker.put(lambda: self._tracker.start(self._info, step))

    def _put(self, step: int, values: Mapping[str, float], pictures: Pictures = ()) -> None:
        def take() -> None:
            if not self._over:
                self._tracker.log(step, values, pictures)

        if self._started and not self._over and not self._worker.put(take):
            self._lost += 1

    def _failed(self, error: Exception) -> None:
        if not self._over:
            self._over = True
            text = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
            log.warning("%s failed and is switched off; the run goes on: %s", self._name, reason)
            log.debug("the failure of %s", self._name, exc_info=error)


class Wandb:
    """Weights & Biases. Values stand over `step`, so that a run which went back draws over what it had."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, info: RunInfo, step: int) -> None:
        import wandb

        info.folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        self._run = wandb.init(
            project=info.project,
            name=info.name,
            id=info.id,
            resume="allow",
            dir=str(info.folder),
            config=dict(info.settings),
            # Nothing on the console, and nothing of the machine that nobody asked to send.
            settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float], pictures: Pictures = ()) -> None:
        import wandb

        shown = {name: wandb.Image(str(file), caption=file.stem) for name, file in pictures if file.is_file()}
        self._run.log({**values, **shown, "step": step})

    def finish(self, code: int) -> None:
        self._run.finish(exit_code=code)


class TensorBoard:
    """Event files for TensorBoard, in a folder of the run's name."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, info: RunInfo, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = info.folder / re.sub(r"[^\w.-]+", "-", info.name)
        # What an earlier course wrote after this step is hidden.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)
        rows = "\n".join(f"| {key} | {value} |" for key, value in info.settings.items())
        if step == 0:
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, values: Mapping[str, float], pictures: Pictures = ()) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for name, file in pictures:
            if file.is_file():
                self._writer.file_writer.add_summary(_summary(name, file), step)
        if pictures:
            self._writer.flush()

    def finish(self, code: int) -> None:
        self._writer.close()


def _summary(name: str, file: Path) -> Any:
    """A picture as TensorBoard stores it: its file as it is, not decoded and encoded again."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    size = re.search(r"_(\d+)x(\d+)(_|$)", file.stem)
    width, height = (int(size[1]), int(size[2])) if size else (0, 0)
    image = Summary.Image(encoded_image_string=file.read_bytes(), width=width, height=height, colorspace=3)
    return Summary(value=[Summary.Value(tag=name, image=image)])


def tracker_sinks(report_to: str, info: RunInfo) -> list[TrackerSink]:
    """A sink for each tracker that is asked for."""
    made = {"wandb": Wandb, "tensorboard": TensorBoard}
    return [TrackerSink(name, made[name](), info) for name in report_to.split(",") if name in made]


def tracker_problems(report_to: str, environ: Mapping[str, str] | None = None) -> list[Problem]:
    """What stands in the way of the trackers that are asked for. Asks no network and imports neither."""
    environ = os.environ if environ is None else environ
    names, problems = report_to.split(","), []
    if "tensorboard" in names and importlib.util.find_spec("tensorboard") is None:
        what = "tensorboard needs its package, which is not installed"
        problems.append(Problem("report_to", what, "pip install 'sana_tune[tensorboard]', or leave tensorboard out"))
    if "wandb" in names and not _is_signed_in(environ):
        what = "wandb needs to know who you are, and nobody is logged in on this machine"
        fix = "`wandb login`, or set WANDB_API_KEY; or keep the run in files with WANDB_MODE=offline"
        problems.append(Problem("report_to", what, fix))
    return problems


def _is_signed_in(environ: Mapping[str, str]) -> bool:
    """Whether wandb has a key, or needs none."""
    mode = environ.get("WANDB_MODE", "").lower()
    if mode in ("offline", "dryrun", "disabled") or environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return True
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    home = Path(environ.get("HOME") or Path.home())
    for path in (environ.get("NETRC"), home / ".netrc", home / "_netrc"):
        try:
            if path and netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
