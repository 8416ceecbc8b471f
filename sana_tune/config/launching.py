"""How many processes and machines a run has: the environment, accelerate's own file, and what a launcher says.

The flags win over the environment, that over config.json, that over accelerate's file. Where the process is one of
several already, its launcher has the last word.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sana_tune.config.findings import Findings
from sana_tune.config.formats import read
from sana_tune.errors import Problem, UserError, gather
from sana_tune.ranks import own_rank, wants_shards

# Variable → the setting that it is, over config.json.
VARIABLES = {
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_NUM_MACHINES": "num_machines",
    "TRAINING_MACHINE_RANK": "machine_rank",
    "MAIN_PROCESS_IP": "main_process_ip",
    "MAIN_PROCESS_PORT": "main_process_port",
    "ACCELERATE_CONFIG_PATH": "accelerate_config",
    "ACCELERATE_EXTRA_ARGS": "accelerate_extra_args",
}
# Variable → the setting that it is where config.json does not have it.
FALLBACKS = {"MIXED_PRECISION": "mixed_precision", "TRAINING_DYNAMO_BACKEND": "dynamo_backend"}
# What accelerate's file and its command line call by the same names as we do.
SHARED = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
FSDP2 = (
    "FSDP2 shards weights, gradients and optimizer states alike: `distributed_type: FSDP` and `fsdp_version: 2` in "
    "accelerate's file (docs/multi-gpu.md)"
)
_COUNTS = ("num_processes", "num_machines")
_TYPES = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
# Words of `accelerate launch` that have no place in accelerate_extra_args, with what to use.
_REFUSED_WORDS = {
    "--cpu": "use --device cpu: accelerate's --cpu starts one process",
    "--config_file": "use --accelerate_config PATH",
    "--mixed_precision": "use --mixed_precision as a setting",
    "--dynamo_backend": "use --dynamo_backend as a setting",
    "--use_megatron_lm": f"train without it; {FSDP2}",
    "--tpu": "there is no training on TPUs here",
    "--module": "the program that is launched is sana_tune itself",
    "-m": "the program that is launched is sana_tune itself",
    "--no_python": "the program that is launched is sana_tune itself",
}


def given_by_variables(environ: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Variable, setting and value of what the environment says over config.json. A count of 0 says nothing."""
    found = [(name, key, environ.get(name, "").strip()) for name, key in VARIABLES.items()]
    return [(name, key, value) for name, key, value in found if value and not (key in _COUNTS and value == "0")]


def lay_the_rest(raw: dict[str, Any], origins: dict[str, str], environ: Mapping[str, str], findings: Findings) -> None:
    """Lay accelerate's words, its file and the launcher's own numbers over and under the settings in `raw`."""
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        findings.wrong("environment: ACCELERATE_USE_DEEPSPEED", "DeepSpeed cannot be used here", FSDP2)
    words = raw.get("accelerate_extra_args")
    if isinstance(words, str):
        _lay_words(words, raw, origins, findings)
    gather(findings.problems, lambda: _lay_file(raw, origins, environ, findings))
    gather(findings.problems, lambda: _lay_launched(raw, origins, environ, findings))


def split(words: str) -> list[str]:
    """The words of accelerate_extra_args, as a shell would split them. Raises ValueError for open quotes."""
    return shlex.split(words)


def _lay_words(text: str, raw: dict[str, Any], origins: dict[str, str], findings: Findings) -> None:
    """What the words for `accelerate launch` say of processes and machines wins over all but the flags."""
    where = origins["accelerate_extra_args"]
    try:
        words = split(text)
    except ValueError as error:
        return findings.wrong(where, f"cannot be split into words: {error}", "close the quotes")
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if "deepspeed" in name:
            findings.wrong(where, f"DeepSpeed cannot be used here; found {name}", FSDP2)
        elif name in _REFUSED_WORDS:
            findings.wrong(where, f"{name} cannot be given here", _REFUSED_WORDS[name])
        key = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and key in SHARED and not origins.get(key, "").startswith("command line"):
            rest = words[number + 1 : number + 2]
            raw[key], origins[key] = value if equals else "".join(rest), f"{where} {name}"


def default_file(environ: Mapping[str, str]) -> Path:
    """Where `accelerate config` writes its answers."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(home).expanduser() / "accelerate" / "default_config.yaml"


def _lay_file(raw: dict[str, Any], origins: dict[str, str], environ: Mapping[str, str], findings: Findings) -> None:
    """Take from accelerate's file what nobody else said. Without being named it counts where it asks for several."""
    named = raw.get("accelerate_config")
    path = Path(named).expanduser() if isinstance(named, str) else default_file(environ)
    if not isinstance(named, str) and not path.is_file():
        return
    try:
        content = read_accelerate(path)
    except UserError as error:
        where = origins.get("accelerate_config", "accelerate's own file")
        raise UserError(*(replace(problem, where=f"{where}: {problem.where}") for problem in error.problems)) from None
    if not isinstance(named, str) and not _asks_for_several(content):
        return
    if str(raw.get("num_processes", content.get("num_processes", 1))) == "1":
        if isinstance(named, str):
            findings.notes.append(f"accelerate_config {path} has no effect: there is one process")
        return
    findings.problems += file_problems(path, content)
    raw.setdefault("accelerate_config", str(path))
    origins.setdefault("accelerate_config", "accelerate's own file")
    compiler = content.get("dynamo_config")
    said = {
        **content,
        "device": "cpu" if content.get("use_cpu") is True else None,
        "dynamo_backend": str(compiler.get("dynamo_backend", "no")).lower() if isinstance(compiler, dict) else None,
    }
    for key in (*SHARED, "mixed_precision", "device", "dynamo_backend"):
        value = said.get(key)
        if key not in raw and value is not None:
            raw[key], origins[key] = value, f"{path}: {key}"
    findings.notes.append(f"accelerate's file {path} is used to launch the processes")


def read_accelerate(path: Path) -> dict[str, Any]:
    """The content of accelerate's file. Raises UserError when it cannot be read."""
    content = read(path, "accelerate config")
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), "accelerate's file must hold names and values", "run `accelerate config`"))
    return content


def _asks_for_several(content: Mapping[str, Any]) -> bool:
    return any(isinstance(content.get(key), int) and content[key] > 1 for key in _COUNTS)


def file_problems(path: Path, content: Mapping[str, Any]) -> list[Problem]:
    """What of accelerate's file cannot be done."""
    kind = str(content.get("distributed_type", "NO")).strip("'\"").upper()
    where, fix = f"{path}: distributed_type", f"{', '.join(_TYPES)} can be used; {FSDP2}"
    if kind == "DEEPSPEED":
        return [Problem(where, "DeepSpeed cannot be used here", FSDP2)]
    if kind not in _TYPES:
        return [Problem(where, f"{kind} cannot be used here", fix)]
    if str(content.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        found = content["compute_environment"]
        return [Problem(f"{path}: compute_environment", f"must be LOCAL_MACHINE; found {found}", "start it there")]
    if kind == "FSDP" and str(fsdp_settings(content).get("fsdp_offload_params", False)).lower() == "true":
        where = f"{path}: fsdp_config: fsdp_offload_params"
        return [Problem(where, "parameters are not moved to main memory here; found true", "remove it")]
    if kind == "FSDP" and str(fsdp_settings(content).get("fsdp_reshard_after_forward", True)).lower() == "false":
        where = f"{path}: fsdp_config: fsdp_reshard_after_forward"
        what = (
            "a block is split again after each forward pass here, or pictures of the average would be of other weights"
        )
        return [Problem(where, f"{what}; found false", "remove it")]
    if kind == "FSDP" and str(fsdp_settings(content).get("fsdp_version", 1)) != "2":
        what = f"must be 2; found {fsdp_settings(content).get('fsdp_version', '1, the default')}"
        fix = "write `fsdp_version: 2`; `accelerate to-fsdp2` converts a file"
        return [Problem(f"{path}: fsdp_config: fsdp_version", what, fix)]
    return []


def fsdp_settings(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of accelerate's file about FSDP."""
    found = content.get("fsdp_config")
    return found if isinstance(found, Mapping) else {}


def is_sharded(path: str | None, words: Sequence[str] = ()) -> bool:
    """Whether accelerate's file or words ask for FSDP, or its launcher said so."""
    if "--use_fsdp" in words or wants_shards():
        return True
    if path is None or not (file := Path(path).expanduser()).is_file():
        return False
    return _names_fsdp(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _names_fsdp(path: Path, changed_ns: int) -> bool:
    """Whether accelerate's file asks for FSDP. The memory plan asks for each of hundreds of ways to fit."""
    content = gather([], lambda: read_accelerate(path))
    return content is not None and str(content.get("distributed_type")).upper() == "FSDP"


def _lay_launched(raw: dict[str, Any], origins: dict[str, str], environ: Mapping[str, str], findings: Findings) -> None:
    """The number of processes that a launcher started holds, whatever was asked for."""
    if (rank := own_rank(environ)) is not None:
        asked = raw.get("num_processes")
        if asked is not None and str(asked) != str(rank.ranks):
            where = origins["num_processes"]
            findings.notes.append(f"{where} ({asked}) is passed over: the launcher started {rank.ranks} processes")
        raw["num_processes"], origins["num_processes"] = rank.ranks, "environment: WORLD_SIZE"
        if wants_shards(environ) and environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(Problem("environment: FSDP_VERSION", "must be 2 with ACCELERATE_USE_FSDP", FSDP2))
    elif environ.get("MASTER_PORT") and environ.get("ACCELERATE_MIXED_PRECISION"):
        what = "`accelerate launch` was asked for several processes and started this one alone, as it does with --cpu"
        fix = "start `sana_tune train --num_processes N` itself, which launches the others; with --device cpu too"
        raise UserError(Problem("environment: MASTER_PORT", what, fix))
