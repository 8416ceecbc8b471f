"""What a run says in words: one logger, one console, one file; and the libraries kept quiet.

The console is shared by log lines and progress bars, so that a line is printed above a running bar.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("sana_tune")

NOISY_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "diffusers",
    "filelock",
    "fsspec",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "PIL",
    "torch",
    "torchao",
    "transformers",
    "urllib3",
)

_QUIET_ENVIRONMENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}

_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}

_console: Console | None = None


def console() -> Console:
    """The one console of this process: standard output. Lines are not wrapped when it is no terminal."""
    global _console
    if _console is None:
        from rich.console import Console

        made = Console(highlight=False, markup=False, emoji=False)
        made.soft_wrap = not made.is_terminal
        _console = made
    return _console


class ConsoleHandler(logging.Handler):
    """Prints records on a rich console; warnings and errors carry their level in front, and before it `prefix`."""

    def __init__(self, target: Console, prefix: str = ""):
        super().__init__()
        self.target = target
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        text = f"{self.prefix}{text}"
        style = _STYLES.get(record.levelno)
        self.target.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class FileHandler(logging.FileHandler):
    """A log file that a full disk stops for a while, and nothing else with it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The screen has the line; what the disk did not take is tried again with the next one."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def setup(level: int | str = logging.INFO, target: Console | None = None, prefix: str = "") -> None:
    """Send the package's log to the console. Calling it again replaces the console handler, files stay.

    prefix: before each line, to tell processes apart.
    """
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in [handler for handler in log.handlers if isinstance(handler, ConsoleHandler)]:
        log.removeHandler(handler)
    handler = ConsoleHandler(target if target is not None else console(), prefix)
    handler.setLevel(level)
    log.addHandler(handler)


def add_file(path: Path) -> logging.Handler:
    """Also append the log, with times and down to debug, to a file. Returns the handler for `remove`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    return handler


def remove(handler: logging.Handler) -> None:
    """Close a handler that `add_file` returned, and take it off the log."""
    log.removeHandler(handler)
    handler.close()


def quiet_libraries() -> None:
    """Keep the libraries off the console: loggers, warnings, advice and bars. Call before importing them.

    A user who sets one of the environment variables has the last word.
    """
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not console().is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    for library in NOISY_LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
