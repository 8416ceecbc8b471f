"""lycoris_config: the file that says which adapter LyCORIS puts on the model. Torch-free.

The names are those of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) and of SimpleTuner's files. Numbers keep
their fraction: a multiplier of 0.5 is 0.5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sana_tune.config.build import build_section
from sana_tune.config.files import resolve
from sana_tune.config.findings import Findings
from sana_tune.config.formats import read
from sana_tune.config.schema import Section, setting
from sana_tune.config.values import nearest
from sana_tune.errors import Problem, UserError

WHAT = "LyCORIS file (lycoris_config)"
ALGORITHMS = ("lokr", "loha", "locon")
# What the class is called in Sana: its feed-forward is no FeedForward.
SAME_CLASS = {"FeedForward": "GLUMBConv"}
DEFAULT_TARGETS = ("Attention", "GLUMBConv")

_OTHERS = "the algorithms are lokr (recommended), loha and locon"
_REFUSED = {
    "use_scalar": "LyCORIS multiplies it into the saved weights, so that no run could go on from them exactly",
    "dropout": "its random numbers have no place in a run that goes on exactly; caption_dropout_probability is there",
    "rank_dropout": "its random numbers have no place in a run that goes on exactly",
    "module_dropout": "its random numbers have no place in a run that goes on exactly",
    "train_norm": "norms are not adapted here",
}


class Override(Section):
    """What is different for the layers in modules of one class. None: as for all."""

    algo: Literal["lokr", "loha", "locon"] | None = setting(None, "another algorithm")
    factor: int | None = setting(None, "another factor", ge=-1)
    dim: int | None = setting(None, "another rank", ge=1)
    alpha: float | None = setting(None, "another alpha", ge=0)
    full_matrix: bool | None = setting(None, "whether the larger factor is whole")


class LycorisFile(Section):
    """The adapter, as the file says it, with FeedForward read as GLUMBConv."""

    algo: Literal["lokr", "loha", "locon"] = setting("lokr", "how the change of a weight is made up")
    multiplier: float = setting(1.0, "the change is multiplied by this")
    linear_dim: int | None = setting(None, "rank of the change; 10000 = as large as it can be", ge=1)
    linear_alpha: float | None = setting(None, "the change is scaled by alpha / rank", ge=0)
    factor: int = setting(-1, "lokr: size of the smaller Kronecker factor; -1 = near the square root", ge=-1)
    full_matrix: bool = setting(False, "lokr: the larger factor is a whole matrix, without rank")
    bypass_mode: bool | None = setting(None, "add the change to a layer's result and not to its weight")
    decompose_both: bool = setting(False, "lokr: the smaller factor is of low rank too")
    unbalanced_factorization: bool = setting(False, "lokr: the larger factor of the output goes first")
    use_tucker: bool = setting(False, "Tucker decomposition of convolutions that are no 1x1")
    dora_wd: bool = setting(False, "decompose the weight into direction and size (DoRA)")
    target_module: tuple[str, ...] = setting(DEFAULT_TARGETS, "classes of modules whose layers are adapted")
    target_name: tuple[str, ...] = setting((), "layers that are adapted, by name: regular expressions")
    exclude_name: tuple[str, ...] = setting((), "layers that are not, by name: regular expressions")
    module_algo_map: Mapping[str, Override] = setting({}, "what is different in modules of a class")

    @property
    def rank(self) -> int:
        """The rank that LyCORIS is given."""
        return self.linear_dim or 10000

    @property
    def alpha(self) -> float:
        """The alpha that LyCORIS is given."""
        return 1.0 if self.linear_alpha is None else self.linear_alpha

    def to_json(self) -> dict[str, Any]:
        """The file as LyCORIS's users write it, with the classes as Sana has them; read again, it means the same."""
        preset: dict[str, Any] = {"target_module": list(self.target_module)}
        for key in ("target_name", "exclude_name"):
            if vars(self)[key]:
                preset[key] = list(vars(self)[key])
        if self.module_algo_map:
            preset["module_algo_map"] = {
                name: override.model_dump(exclude_none=True) for name, override in self.module_algo_map.items()
            }
        inner = ("target_module", "target_name", "exclude_name", "module_algo_map")
        own = {key: value for key, value in self.model_dump(exclude_none=True).items() if key not in inner}
        return {**own, "linear_dim": self.rank, "linear_alpha": self.alpha, "apply_preset": preset}

    def digest_text(self) -> str:
        """The same for files that mean the same adapter."""
        return json.dumps(self.to_json(), sort_keys=True)


def read_lycoris(path: str) -> LycorisFile:
    """The file at a path. Raises UserError with all that is wrong in it."""
    return lycoris_of(read(resolve(path), WHAT), path)


def lycoris_of(content: Any, path: str) -> LycorisFile:
    """What a file holds, understood. Raises UserError with all that is wrong in it."""
    if not isinstance(content, dict):
        raise UserError(Problem(path, 'a LyCORIS file is {"algo": "lokr", …}', "put { } around the settings"))
    findings = Findings()
    values, preset = dict(content), {}
    if isinstance(given := values.pop("apply_preset", {}), dict):
        preset = dict(given)
    else:
        findings.wrong(f"{path}: apply_preset", "must be an object", 'write {"target_module": ["Attention"]}')
    values = {key: value for key, value in values.items() if not (key in _REFUSED and value in (0, False, None))}
    for key in [key for key in values if key in _REFUSED]:
        findings.wrong(f"{path}: {key}", f"cannot be used: {_REFUSED[key]}", "leave it out")
        del values[key]
    if values.get("algo") in ("lora", "LoRA"):
        values["algo"] = "locon"
    if isinstance(values.get("algo"), str):
        values["algo"] = values["algo"].lower()
        if values["algo"] not in ALGORITHMS:
            findings.wrong(f"{path}: algo", f"{values.pop('algo')} is not supported: {_OTHERS}", "use lokr")
    for key in ("algo", "linear_dim", "linear_alpha"):
        if key not in content and not (key != "algo" and content.get("full_matrix") is True):
            findings.wrong(path, f"{key} is missing", "add it; a whole LoKr has full_matrix true and needs no rank")
    _names(values, preset, path, findings)
    known = set(LycorisFile.model_fields)
    for place, key in [*((path, key) for key in values), *((f"{path}: apply_preset", key) for key in preset)]:
        if key not in known:
            guess = nearest(key, known)
            fix = f"did you mean {guess}?" if guess else f"the settings are: {', '.join(sorted(known))}"
            findings.wrong(f"{place}: {key}", "there is no such setting", fix)
    merged = {key: value for key, value in {**values, **preset}.items() if key in known}
    section = build_section(LycorisFile, merged, lambda key: f"{path}: {key}", findings)
    if findings.problems or not isinstance(section, LycorisFile):
        raise UserError(*findings.problems)
    return section


def _names(values: dict[str, Any], preset: dict[str, Any], path: str, findings: Findings) -> None:
    """Classes by the names that Sana has for them; overrides understood. Changes `preset`."""
    preset.pop("enable_conv", None)  # convolutions are adapted where their module is named
    targets = preset.get("target_module")
    if isinstance(targets, list):
        preset["target_module"] = tuple(dict.fromkeys(SAME_CLASS.get(name, name) for name in targets))
    overrides = preset.get("module_algo_map", {})
    if not isinstance(overrides, dict):
        findings.wrong(f"{path}: module_algo_map", "must be an object", 'write {"Attention": {"factor": 16}}')
        del preset["module_algo_map"]
        return
    found: dict[str, Override] = {}
    for key, given in overrides.items():
        name = str(key)
        where = f"{path}: module_algo_map: {name}"
        if not isinstance(given, dict):
            findings.wrong(where, "must be an object", 'write {"factor": 16}')
            continue
        renamed = {_OWN.get(str(key), str(key)): value for key, value in given.items()}
        if unknown := sorted(renamed.keys() - Override.model_fields.keys()):
            known = ", ".join(Override.model_fields)
            findings.wrong(f"{where}: {unknown[0]}", "there is no such setting here", f"a class may have: {known}")
            continue
        section = build_section(Override, renamed, lambda key, where=where: f"{where}: {key}", findings)
        if isinstance(section, Override):
            found[SAME_CLASS.get(name, name)] = section
    if "module_algo_map" in preset:
        preset["module_algo_map"] = found


_OWN = {"linear_dim": "dim", "linear_alpha": "alpha"}


# ---- files of what is trained ----


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint has its weights and their average, each with a config file of this name beside it."""

    weights: str
    average: str
    config: str

    def of(self, suffix: str) -> str:
        """The file of the weights that pictures with this suffix show: "" or "_ema"."""
        return self.average if suffix else self.weights


WHOLE = Layout(
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer_ema/diffusion_pytorch_model.safetensors",
    "config.json",
)
# As LyCORIS and SimpleTuner name them.
ADAPTER = Layout("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors", "lycoris_config.json")
