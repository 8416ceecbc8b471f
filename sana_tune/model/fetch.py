"""Where a model's files are: built in, in a folder, or on the Hugging Face Hub. Torch-free.

huggingface_hub is imported when a hub id is looked up, and obeys HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE as ever. Only the files that are needed are downloaded, one variant of each component. A dropped
connection goes on inside the file; a killed download keeps its finished files and begins the others again.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from sana_tune.errors import Problem, UserError
from sana_tune.model.facts import KNOWN
from sana_tune.model.layout import COMPONENTS, INDEX, check_folder, choose_weights

NANO = "nano"
KEY = "pretrained_model_name_or_path"
log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubFiles:
    """What is needed of a hub repository: file → bytes, and how many of these bytes are not on this machine yet."""

    name: str
    sizes: dict[str, int]
    missing_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


def locate(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "fp32",
    offline: bool | None = None,
) -> Path:
    """The local folder of a model, downloaded first if need be.

    name: "nano", a folder in diffusers layout, or a hub id. variant, dtype: see `layout.choose_weights`.
    offline: never ask the hub; None = as HF_HUB_OFFLINE says. Raises UserError with what is wrong and what to do:
    no such folder, not a Sana model, unknown, gated, no network, not in the cache, torn files.
    """
    folder = local_folder(name)
    if folder is not None:
        if revision is not None:
            raise UserError(
                Problem("revision", f"a revision belongs to a hub id; {name} is a folder", "leave `revision` out")
            )
    elif _is_offline(offline):
        folder = _cached(name, revision)
    else:
        folder = _download(name, revision, variant, dtype)
    chosen = check_folder(folder, variant=variant, dtype=dtype)
    for weights in chosen.values():
        log.debug("%s: %s", weights.component, ", ".join(weights.files))
    return folder


def local_folder(name: str) -> Path | None:
    """The folder of "nano" or of a path, None for a hub id. Raises UserError for a path that is not there."""
    if name == NANO:
        return Path(str(files("sana_tune") / "assets" / "nano" / "model"))
    path = Path(name).expanduser()
    if os.path.isdir(path):
        return path.resolve()
    if os.path.isfile(path):
        raise UserError(
            Problem(
                KEY,
                f"a model is a folder in diffusers layout or a hub id; {name} is a file",
                "convert single-file checkpoints with diffusers first",
            )
        )
    if not _HUB_ID.fullmatch(name):
        raise UserError(_no_such(name))
    return None


def on_disk(name: str, *, revision: str | None = None, variant: str | None = None, dtype: str = "fp32") -> Path | None:
    """The whole model on this machine, or None for a hub model that must be downloaded first. Asks no network.

    Raises UserError as `locate` for "nano" and for a folder.
    """
    if local_folder(name) is not None:
        return locate(name, revision=revision, variant=variant, dtype=dtype)
    folder = _in_cache(name, revision)
    try:
        if folder is not None:
            check_folder(folder, variant=variant, dtype=dtype)
    except UserError:  # a part of it: the rest is downloaded
        return None
    return folder


def is_offline() -> bool:
    """Whether downloads are forbidden (HF_HUB_OFFLINE)."""
    return _is_offline(None)


def likely_meant(name: str) -> str | None:
    """The published model whose name is nearly this one; None for a name that is one, or like none."""
    return None if name in KNOWN else next(iter(difflib.get_close_matches(name, list(KNOWN), n=1, cutoff=0.8)), None)


def plan_download(
    name: str, *, revision: str | None = None, variant: str | None = None, dtype: str = "fp32"
) -> int | None:
    """Bytes that `locate` would download: 0 for what is here already, None when the hub cannot be asked."""
    if local_folder(name) is not None:
        return 0
    if _is_offline(None):
        return None
    with _told(name, revision):
        return _listing(name, revision, variant, dtype).missing_bytes


def one_file(name: str, file: str, *, key: str) -> Path:
    """One file of a hub repository, downloaded if need be. key: the setting that asks for it. Raises UserError."""
    from huggingface_hub import errors, hf_hub_download

    try:
        with _told(name, None):
            try:
                return Path(hf_hub_download(name, file))
            except errors.RemoteEntryNotFoundError as error:
                what = f"the repository {name} has no file {file}"
                raise UserError(Problem(key, what, "look for its name on the hub")) from error
    except _NoNetwork as error:
        raise UserError(replace(error.problem, where=key)) from error
    except UserError as error:
        raise UserError(*(replace(problem, where=key) for problem in error.problems)) from error


def _download(name: str, revision: str | None, variant: str | None, dtype: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with _told(name, revision):
            listing = _listing(name, revision, variant, dtype)
            if listing.missing_bytes:
                log.info("downloading %s: %.2f GB of weights and settings", name, listing.missing_bytes / 1e9)
            return Path(snapshot_download(name, revision=revision, allow_patterns=sorted(listing.sizes)))
    except _NoNetwork as error:
        return _earlier_copy(name, revision, variant, dtype, error)


def _earlier_copy(name: str, revision: str | None, variant: str | None, dtype: str, error: _NoNetwork) -> Path:
    """A whole copy that was downloaded before, with a warning; the trouble with the network if there is none."""
    folder = _in_cache(name, revision)
    try:
        if folder is None:
            raise UserError(error.problem)
        check_folder(folder, variant=variant, dtype=dtype)
    except UserError:
        raise UserError(error.problem) from error
    log.warning("%s; going on with the copy downloaded earlier", error.problem.what)
    return folder


def _listing(name: str, revision: str | None, variant: str | None, dtype: str) -> HubFiles:
    """Ask the hub for a repository's files and choose those that are needed."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    info = HfApi().model_info(name, revision=revision, files_metadata=True)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    if INDEX not in sizes:
        raise UserError(
            Problem(
                KEY,
                f"{name} has no {INDEX}: it is not in diffusers layout",
                "name the repository whose name ends in _diffusers",
            )
        )
    wanted = needed_files(sizes, name, variant=variant, dtype=dtype)
    missing = [file for file in wanted if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)]
    return HubFiles(name, {file: sizes[file] for file in wanted}, sum(sizes[file] for file in missing))


def needed_files(
    names: dict[str, int] | list[str], where: str, *, variant: str | None = None, dtype: str = "fp32"
) -> list[str]:
    """Of a repository's files: the index, each component's configs and tokenizer files, and one variant of weights."""
    chosen = choose_weights(names, where, variant=variant, dtype=dtype)
    wanted = {INDEX}
    for weights in chosen.values():
        wanted.update(weights.files)
        if weights.index:
            wanted.add(weights.index)
    for name in names:
        component, _, rest = name.partition("/")
        small = rest.endswith((".json", ".model", ".txt", ".jinja")) and ".index." not in rest
        if component in COMPONENTS and "/" not in rest and small:
            wanted.add(name)
    return sorted(wanted)


def _cached(name: str, revision: str | None) -> Path:
    folder = _in_cache(name, revision)
    if folder is None:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            Problem(
                KEY,
                f"there is no folder of this name here, offline mode is on (HF_HUB_OFFLINE), and {name}{at} "
                "has not been downloaded from the hub",
                "download it once with the network, copy its folder here, or set HF_HOME to where it is",
            )
        )
    return folder


def _in_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, INDEX, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _is_offline(offline: bool | None) -> bool:
    if offline is not None:
        return offline
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


class _NoNetwork(Exception):
    def __init__(self, problem: Problem):
        self.problem = problem
        super().__init__(problem.what)


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's exceptions into the user's problems; trouble with the network into _NoNetwork."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(_gated(name)) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            Problem("revision", f"{name} has no revision {revision!r}", "see the repository's branches and tags")
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(_unknown(name)) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            signed_in = "authorization" in error.response.request.headers
            raise UserError(_bad_token(name) if signed_in else _unknown(name)) from error
        raise _NoNetwork(_hub_trouble(name, f"the hub answered {error.response.status_code}")) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise _NoNetwork(_hub_trouble(name, _reason(error))) from error
    except OSError as error:
        if error.errno is None:  # what came was not what the hub had promised
            raise _NoNetwork(_hub_trouble(name, _reason(error))) from error
        raise UserError(
            Problem(KEY, f"{name} cannot be stored: {error}", "make room, or set HF_HOME to a disk with more of it")
        ) from error


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__


def _gated(name: str) -> Problem:
    return Problem(
        KEY,
        f"{name} is gated: its owner asks you to accept its terms, and this machine shows no token that has",
        f"accept them at {_page(name)}, then `hf auth login` or set HF_TOKEN",
    )


def _bad_token(name: str) -> Problem:
    return Problem(
        KEY, f"the hub refuses the token that was shown for {name}", "`hf auth login` again, or mend or unset HF_TOKEN"
    )


def _unknown(name: str) -> Problem:
    guess = difflib.get_close_matches(name, list(KNOWN), n=1, cutoff=0.6)
    hint = f"did you mean {guess[0]}? " if guess else ""
    return Problem(
        KEY,
        f"the hub has no public repository {name}, and there is no folder of this name here",
        f"{hint}For a private repository, `hf auth login` or set HF_TOKEN",
    )


def _no_such(name: str) -> Problem:
    guess = difflib.get_close_matches(name, [NANO, *KNOWN], n=1, cutoff=0.6)
    hint = f"did you mean {guess[0]}? " if guess else ""
    return Problem(
        KEY,
        f"a model is `nano`, a folder, or a hub id such as owner/name; there is no folder {name} "
        f"(looked in {Path.cwd()})",
        f"{hint}Check the path; relative paths start at the working directory",
    )


def _hub_trouble(name: str, reason: str) -> Problem:
    from huggingface_hub import constants

    return Problem(
        KEY,
        f"{name} is not a folder here, and the hub at {constants.ENDPOINT} cannot be reached ({reason})",
        "check the network (HF_ENDPOINT names a mirror); what was downloaded is kept and the next run continues it",
    )


def _page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"
