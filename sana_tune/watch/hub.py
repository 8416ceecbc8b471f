"""Uploads to the Hugging Face Hub: of checkpoints on the way and of the pipeline at the end, on a thread of its own.

One commit each, whole or not at all; what was sent before a failure is not sent again. A failed upload is told at the
end and stops nothing. The client obeys HF_ENDPOINT, HF_HOME and HF_TOKEN as ever.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sana_tune.config.schema import WatchConfig
from sana_tune.config.secrets import masked
from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.watch.background import Worker, attempt, persist
from sana_tune.watch.events import Event, Finished, Saved
from sana_tune.watch.uploads import Uploaded

WAITS_S = (5.0, 30.0, 120.0)  # between the tries of an upload; the client's own tries of a request come on top
WAITING = 3  # checkpoints that may wait; a slow line must not fill the disk
STAGING = ".upload-"
OPTIMIZER_FILES = ("optimizer*", "*/optimizer*", "scaler*")
_FINAL = frozenset({400, 401, 403, 404, 409, 422})  # answers that another try does not change


@dataclass(frozen=True)
class Repository:
    """Where uploads go. id: owner/name. endpoint: of the hub, None = the official one."""

    id: str
    private: bool
    endpoint: str | None = None


@dataclass(frozen=True)
class _Upload:
    """One folder to be sent. origin: what the user knows it as. staged: a folder of links to it, removed afterwards.

    readme: the card that goes to the root.
    """

    origin: Path
    path_in_repo: str
    step: int
    message: str
    readme: str | None = None
    staged: Path | None = None
    ignore: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the files are read."""
        return self.staged or self.origin


Card = Callable[[str, int], str]  # path in the repository of the weights, step → README.md


class HubSink:
    """Uploads what the settings ask for, of the run in the folder `root`. card: text of README.md beside a checkpoint.

    done: told of every upload, on the thread that did it.
    """

    def __init__(
        self,
        root: Path,
        settings: WatchConfig,
        repository: Repository,
        card: Card,
        done: Callable[[Uploaded], None] = lambda upload: None,
        waits_s: Sequence[float] = WAITS_S,
    ):
        self._settings, self._repository, self._card = settings, repository, card
        self._done, self._waits_s = done, waits_s
        self._worker = Worker("hub", WAITING, lambda error: log.warning("uploads: %s", reason(error)))
        self._failed: list[str] = []
        self._exists = False
        for left in root.glob(f"{STAGING}*"):  # of a run that was killed
            _remove(left)

    def emit(self, event: Event) -> None:
        """Queue an upload; with push_to_hub_background false, wait for it."""
        match event:
            case Saved(progress=progress, path=path) if self._settings.push_checkpoints_to_hub:
                self._queue(self._checkpoint(Path(path), progress.step))
                if not self._settings.push_to_hub_background:
                    self._worker.drain()
            case Finished(progress=progress, pipeline=pipeline) if self._settings.push_to_hub and pipeline:
                self._queue(self._finished(Path(pipeline), progress.step))

    def close(self) -> None:
        """Wait for the uploads, as long as they take, and tell of those that failed."""
        if pending := self._worker.pending:
            what = "the upload" if pending == 1 else f"{pending} uploads"
            log.info("Waiting for %s to %s", what, self._repository.id)
        self._worker.finish()
        for text in self._failed:
            log.warning("%s", text)

    def _queue(self, upload: _Upload) -> None:
        if not self._worker.put(lambda: self._send(upload)):
            _remove(upload.staged)
            where = upload.path_in_repo or "the pipeline"
            self._failed.append(f"{where} was not uploaded: earlier uploads had not ended")
            log.warning("%s is not uploaded: earlier uploads have not ended yet", where)

    def _checkpoint(self, path: Path, step: int) -> _Upload:
        """The upload of a checkpoint, held by hard links: the run may prune it meanwhile."""
        ignore = () if self._settings.push_optimizer_to_hub else OPTIMIZER_FILES
        staged = path.parent / f"{STAGING}{path.name}"
        _remove(staged)
        try:
            for name in _files(path, ignore):
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(path / name, staged / name)
        except OSError as error:  # a file system without links: it is read where it is
            log.debug("%s is uploaded from its own place: %s", path, error)
            _remove(staged)
        readme, kept = self._card(path.name, step), staged if staged.is_dir() else None
        return _Upload(path, path.name, step, f"Checkpoint of step {step}", readme, kept, ignore)

    def _finished(self, folder: Path, step: int) -> _Upload:
        """The upload of the pipeline; its card names the repository where the local one names a folder."""
        try:
            text = (folder / "README.md").read_text(encoding="utf-8")
        except OSError:
            return _Upload(folder, "", step, f"Pipeline after {step} steps")
        here, there = (json.dumps(str(place), ensure_ascii=False) for place in (folder, self._repository.id))
        message = f"Pipeline after {step} steps"
        return _Upload(folder, "", step, message, text.replace(here, there), ignore=("README.md",))

    # ---- on the worker's thread ----

    def _send(self, upload: _Upload) -> None:
        where = upload.path_in_repo or "the pipeline"

        def told(error: Exception, wait_s: float) -> None:
            log.info("The upload of %s failed (%s); it is tried again in %.0f s", where, reason(error), wait_s)

        hurry = self._worker.hurry
        error = attempt(lambda: persist(lambda: self._commit(upload), self._waits_s, hurry, is_final, told))
        _remove(upload.staged)
        if error is not None:
            by_hand = f"hf upload {self._repository.id} {upload.origin} {upload.path_in_repo}".strip()
            self._failed.append(f"{where} was not uploaded: {reason(error)}; by hand: {by_hand}")
            log.warning("The upload of %s failed: %s; the run goes on", where, reason(error))
            log.debug("the failure of the upload", exc_info=error)

    def _commit(self, upload: _Upload) -> None:
        """Send the files and commit them. Raises what the client raises."""
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the run has its own
        api, repository = HfApi(endpoint=self._repository.endpoint), self._repository
        if not self._exists:
            api.create_repo(repository.id, private=repository.private, exist_ok=True)
            self._exists = True
        prefix = f"{upload.path_in_repo}/" if upload.path_in_repo else ""
        operations = [
            CommitOperationAdd(path_in_repo=f"{prefix}{name}", path_or_fileobj=str(upload.folder / name))
            for name in _files(upload.folder, upload.ignore)
        ]
        if upload.readme is not None:
            operations.append(CommitOperationAdd("README.md", upload.readme.encode("utf-8")))
        api.create_commit(repository.id, operations, commit_message=upload.message)
        base = f"{api.endpoint}/{repository.id}"
        url = f"{base}/tree/main/{upload.path_in_repo}" if upload.path_in_repo else base
        log.info("Uploaded %s to %s", upload.path_in_repo or "the pipeline", url)
        self._done(Uploaded(upload.origin, repository.id, url, upload.step))


def _files(folder: Path, ignore: Sequence[str]) -> Iterator[str]:
    """Every file below a folder that no pattern is for, with forward slashes."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in ignore):
            yield name


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def is_final(error: Exception) -> bool:
    """Whether another try would fail the same way: the hub has refused, or a file is gone."""
    return _status(error) in _FINAL or isinstance(error, FileNotFoundError)


def _status(error: BaseException) -> int | None:
    """The status that the hub answered with, also when another error was made of it."""
    response: Any = vars(error).get("response")
    if response is not None:
        return int(response.status_code)
    return _status(error.__cause__) if error.__cause__ is not None else None


def reason(error: Exception) -> str:
    """An error in a line, without tokens."""
    status = _status(error)
    if status is not None:
        said = {401: "the token is refused", 403: "the token may not write there", 404: "there is no such repository",
                429: "too many requests", 507: "no room is left there"}.get(status)  # fmt: skip
        return f"the hub answered {status}" + (f": {said}" if said else "")
    text = str(error).strip().splitlines()
    return str(masked("", f"{type(error).__name__}: {text[0]}" if text else type(error).__name__))


# ---- before the run ----


def wants_hub(settings: WatchConfig) -> bool:
    """Whether anything is to be uploaded."""
    return settings.push_to_hub or settings.push_checkpoints_to_hub


def hub_problems(settings: WatchConfig) -> list[Problem]:
    """What stands in the way of uploads as far as this machine knows. Asks no network."""
    if not wants_hub(settings):
        return []
    from huggingface_hub import constants, get_token

    key = "push_to_hub" if settings.push_to_hub else "push_checkpoints_to_hub"
    if constants.HF_HUB_OFFLINE:
        return [Problem(key, "uploads need the network, and offline mode is on (HF_HUB_OFFLINE)",
                        "unset HF_HUB_OFFLINE, or leave the key out")]  # fmt: skip
    if not get_token():
        return [Problem(key, "uploads need a token of the hub, and this machine has none",
                        "`hf auth login`, or set HF_TOKEN to a token that may write")]  # fmt: skip
    return []


def find_repository(settings: WatchConfig, name: str, environ: Mapping[str, str] | None = None) -> Repository:
    """Ask the hub whose token this is, and answer where uploads go. name: "owner/name", or "name" of one's own.

    Raises UserError when the token is refused, may only read, or may not write for that owner, or the hub is away.
    """
    from huggingface_hub import HfApi, errors

    environ = os.environ if environ is None else environ
    endpoint = environ.get("HF_ENDPOINT") or None
    api, key = HfApi(endpoint=endpoint), "push_to_hub" if settings.push_to_hub else "push_checkpoints_to_hub"
    try:
        who = api.whoami()
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            fix = "`hf auth login` again, or mend HF_TOKEN"
            raise UserError(Problem(key, "the hub refuses the token of this machine", fix)) from None
        raise UserError(_away(key, api.endpoint, reason(error))) from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(_away(key, api.endpoint, type(error).__name__)) from None
    owner = name.split("/")[0] if "/" in name else str(who["name"])
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        what = f"the token of {who['name']} may only read"
        raise UserError(Problem(key, what, "make one that may write at https://huggingface.co/settings/tokens"))
    owners = [str(who["name"]), *(str(org.get("name")) for org in who.get("orgs") or ())]
    if owner not in owners:
        what = f"{who['name']} may not write for {owner}; it may for {', '.join(owners)}"
        raise UserError(Problem("hub_model_id", what, f"use {who['name']}/{name.split('/')[-1]}"))
    return Repository(name if "/" in name else f"{owner}/{name}", settings.model_card_private, endpoint)


def _away(key: str, endpoint: str, why: str) -> Problem:
    what = f"the hub at {endpoint} cannot be asked whether uploads may go there ({why})"
    return Problem(key, what, "check the network and HF_ENDPOINT, or leave the key out and upload by hand later")
