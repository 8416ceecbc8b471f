"""How the settings of trackers, webhooks, scripts and the hub are read. Pure but for a file that is named; no torch."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from sana_tune.config.files import resolve
from sana_tune.config.findings import Findings
from sana_tune.config.formats import read
from sana_tune.config.placeholders import expand_env
from sana_tune.config.values import nearest
from sana_tune.errors import UserError

TRACKERS = ("wandb", "tensorboard")
LEVELS = ("debug", "info", "warning", "error", "critical")
Level = Literal["debug", "info", "warning", "error", "critical"]
# Type of a webhook → the key that holds its address.
WEBHOOK_TYPES: Mapping[str, str] = {"discord": "webhook_url", "raw": "callback_url"}
WEBHOOK_KEYS = (
    "webhook_type", "webhook_url", "callback_url", "message_prefix", "log_level", "ssl_no_verify", "auth_token",
)  # fmt: skip
# What a script's arguments can hold; every setting whose name begins with validation_ comes beside them.
SCRIPT_NAMES = (
    "local_checkpoint_path", "global_step", "tracker_run_name", "tracker_project_name", "model_family", "model_type",
    "lora_type", "huggingface_path", "remote_checkpoint_path",
)  # fmt: skip
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_FOREIGN_TRACKERS = {
    "swanlab": "use wandb or tensorboard",
    "comet_ml": "use wandb or tensorboard",
    "custom-tracker": "metrics.jsonl holds every number as it comes: follow that file",
    "simpletuner": "metrics.jsonl and the pictures are always in output_dir: leave it out",
}


@dataclass(frozen=True)
class Webhook:
    """Where messages go, and which. url and auth_token are secrets: no repr shows them."""

    kind: Literal["discord", "raw"]
    url: str = field(repr=False)
    message_prefix: str = ""
    log_level: Level = "info"
    ssl_no_verify: bool = False
    auth_token: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Type and host, for messages: the rest of an address can be a secret."""
        parts = urlsplit(self.url)
        port = f":{parts.port}" if parts.port else ""
        return f"{self.kind} webhook at {parts.hostname}{port}"

    def hears(self, severity: str) -> bool:
        """Whether messages of this severity are wanted."""
        return LEVELS.index(severity) >= LEVELS.index(self.log_level)


def parse_trackers(value: Any) -> str:
    """Read "wandb", "wandb,tensorboard", "all", "none" or a list: the names in a fixed order with commas, or none.

    Raises ValueError with everything that is no tracker.
    """
    if value is None or value == "":
        return "none"
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    names = [str(part).strip().lower() for part in parts if str(part).strip()]
    known = (*TRACKERS, "all", "none")
    wrong = [_no_tracker(name, known) for name in dict.fromkeys(names) if name not in known]
    if wrong:
        raise ValueError("; ".join(wrong))
    if "all" in names:
        return ",".join(TRACKERS)
    return ",".join(name for name in TRACKERS if name in names) or "none"


def _no_tracker(name: str, known: Sequence[str]) -> str:
    if name in _FOREIGN_TRACKERS:
        return f"{name} cannot be used: {_FOREIGN_TRACKERS[name]}"
    guess = nearest(name, known)
    hint = f"did you mean {guess}? " if guess else ""
    return f"there is no tracker {name!r}; {hint}known: {', '.join(known)}, several with commas"


def parse_webhooks(value: Any) -> tuple[Webhook, ...] | None:
    """Read an object, a list of objects, either of them as JSON text, or the path of a JSON file that holds one.

    {env:NAME} stands for a variable in a file too. Raises ValueError with everything that is wrong; no secret is shown.
    """
    if value is None or value in ("", [], (), {}):
        return None
    if isinstance(value, str):
        value = _webhooks_of(value.strip())
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    found, wrong = [], []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, Webhook):
            found.append(entry)
            continue
        place = f"webhook {number}: " if len(entries) > 1 else ""
        problems = _wrong_with(entry)
        wrong += [f"{place}{problem}" for problem in problems]
        if not problems:
            found.append(_webhook(entry))
    if wrong:
        raise ValueError("; ".join(wrong))
    return tuple(found)


def _webhooks_of(text: str) -> Any:
    """What a text means: JSON, or the path of a file of it."""
    if text[0] in "{[":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"must be JSON: {error}") from None
    if text.startswith(("http://", "https://")):
        kind = "discord" if "discord" in text else "raw"
        address = f'"webhook_type": "{kind}", "{WEBHOOK_TYPES[kind]}": "…"'
        raise ValueError(f"an address alone does not say what to send there; write {{{address}}}")
    findings = Findings()
    try:
        content, _ = expand_env(read(resolve(text), "file of webhooks"), text, os.environ, findings)
    except UserError as error:
        raise ValueError("; ".join(f"{problem.where}: {problem.what}" for problem in error.problems)) from None
    if findings.problems:
        raise ValueError("; ".join(f"{text}: {problem.what}" for problem in findings.problems))
    return content


def _wrong_with(entry: Any) -> list[str]:
    """Everything that is wrong with one entry. Values of addresses and tokens are not shown."""
    if not isinstance(entry, Mapping):
        return [f'a webhook is an object {{"webhook_type": …}}; found {type(entry).__name__}']
    wrong = []
    for key in entry:
        if key not in WEBHOOK_KEYS:
            guess = nearest(str(key), WEBHOOK_KEYS)
            wrong.append(f"there is no key {key!r}; " + (f"did you mean {guess}?" if guess else _listed(WEBHOOK_KEYS)))
    kind = entry.get("webhook_type")
    if kind not in WEBHOOK_TYPES:
        guess = nearest(str(kind), WEBHOOK_TYPES) if kind else None
        hint = f"; did you mean {guess}?" if guess else ""
        found = "is missing" if kind is None else f"found {kind!r}"
        wrong.append(f"webhook_type must be {' or '.join(WEBHOOK_TYPES)}; {found}{hint}")
    else:
        wrong += _wrong_address(entry, WEBHOOK_TYPES[str(kind)])
    level = entry.get("log_level", "info")
    if level not in LEVELS:
        guess = nearest(str(level), LEVELS)
        hint = f"; did you mean {guess}?" if guess else ""
        wrong.append(f"log_level must be one of {', '.join(LEVELS)}; found {level!r}{hint}")
    if _switch(entry.get("ssl_no_verify", False)) is None:
        wrong.append(f"ssl_no_verify must be true or false; found {entry['ssl_no_verify']!r}")
    wrong += [f"{key} must be text" for key in ("message_prefix", "auth_token")
              if not isinstance(entry.get(key) or "", str)]  # fmt: skip
    token = entry.get("auth_token") or ""
    if isinstance(token, str) and not (token.isascii() and token.isprintable()):
        wrong.append("auth_token goes into a header, which holds printable ASCII alone")
    return wrong


def _wrong_address(entry: Mapping[str, Any], key: str) -> list[str]:
    address = entry.get(key)
    if address is None or address == "":
        other = next((name for name in WEBHOOK_TYPES.values() if name != key and entry.get(name)), None)
        hint = f"; found {other}, which is of another type" if other else ""
        return [f"webhook_type {entry['webhook_type']} needs {key}{hint}"]
    try:
        parts = urlsplit(address) if isinstance(address, str) else None
        usable = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    return [] if usable else [f"{key} must be an address such as https://example.com/hook (it is not shown here)"]


def _webhook(entry: Mapping[str, Any]) -> Webhook:
    kind = entry["webhook_type"]
    return Webhook(
        kind,
        entry[WEBHOOK_TYPES[kind]],
        str(entry.get("message_prefix") or ""),
        entry.get("log_level", "info"),
        bool(_switch(entry.get("ssl_no_verify", False))),
        entry.get("auth_token") or None,
    )


def _switch(value: Any) -> bool | None:
    words = {"true": True, "false": False, "1": True, "0": False, "none": False}
    return words.get(str(value).strip().lower())


def _listed(names: Sequence[str]) -> str:
    return f"known: {', '.join(names)}"


def parse_hub_id(value: Any) -> Any:
    """A repository of the hub as "owner/name" or "name"; its address is understood. Raises ValueError."""
    if value is None or value == "":
        return None
    text = value.strip() if isinstance(value, str) else ""
    if text.startswith(("http://", "https://")):
        text = "/".join(part for part in urlsplit(text).path.split("/") if part)
        text = "/".join(text.split("/")[:2])  # what follows is a place inside the repository
    elif text.startswith("huggingface.co/"):
        text = text.removeprefix("huggingface.co/")
    text = text.strip("/")
    name = text.split("/")[-1]
    if (
        not _HUB_ID.fullmatch(text)
        or "--" in text
        or ".." in text
        or len(name) > 96
        or name.endswith((".git", "-", "."))
    ):
        must = "a repository of the hub is owner/name or name: letters, digits, - _ and . (no -- or .., at most 96)"
        raise ValueError(f"{must}; found {value!r}")
    return text


def parse_comment(value: Any) -> Any:
    """A text, or a list of its lines. Raises ValueError."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError(f"must be text, or a list of lines; found {value!r}")
    return value


def parse_script(value: Any) -> Any:
    """A command with arguments, as one would write it: it is split into words and no shell reads it.

    Raises ValueError for quotes that do not close and for placeholders that do not exist.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f'must be a command such as "scripts/copy.sh {{local_checkpoint_path}}"; found {value!r}')
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}") from None
    strange = [name for name in _PLACEHOLDER.findall(value) if not _is_placeholder(name)]
    if strange:
        told = []
        for name in dict.fromkeys(strange):
            guess = nearest(name, SCRIPT_NAMES)
            told.append(f"{{{name}}}" + (f" (did you mean {{{guess}}}?)" if guess else ""))
        known = ", ".join(f"{{{name}}}" for name in SCRIPT_NAMES)
        raise ValueError(f"there is no placeholder {', '.join(told)}; known: {known} and the validation_ settings")
    if not words or _PLACEHOLDER.search(words[0]):
        raise ValueError("must begin with the program to run, which is no placeholder")
    return value


def _is_placeholder(name: str) -> bool:
    return name in SCRIPT_NAMES or name.startswith("validation_")


def script_words(command: str, values: Mapping[str, str]) -> list[str]:
    """The words of a command, each placeholder replaced inside its word: a value never becomes two words.

    A placeholder without a value becomes nothing.
    """
    return [_PLACEHOLDER.sub(lambda match: values.get(match[1], ""), word) for word in shlex.split(command)]
