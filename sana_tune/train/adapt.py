"""A LyCORIS adapter on a frozen Sana transformer: put on, switched off, saved, loaded, and merged into the weights.

LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS, Apache-2.0) makes the modules and computes with them; names and
files are its own, so that its loader reads what is saved here. Its choice of layers is a state of the whole class,
which is put back as it was.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sana_tune.config.lycoris import LycorisFile
from sana_tune.data.records import digest
from sana_tune.errors import Problem, UserError
from sana_tune.model.adapted import LEFT_OUT

NAME = "lycoris"  # of the network inside the transformer
_CLASS_STATE = (
    "ENABLE_CONV", "TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "TARGET_EXCLUDE_NAME", "MODULE_ALGO_MAP",
    "NAME_ALGO_MAP", "USE_FNMATCH", "LORA_PREFIX",
)  # fmt: skip


class Adapter:
    """A LyCORIS network that is put on `transformer`, whose own weights must be frozen already.

    Its parameters are fp32 and trainable; they lie under `lycoris.` in the transformer's. Where the weights below are
    not fp32 the change is added to a layer's result: added to such a weight it would be rounded away.
    seed: of the parameters that do not begin as zero.
    """

    def __init__(self, transformer: Any, file: LycorisFile, seed: int = 0):
        self.transformer, self.file = transformer, file
        device = next(transformer.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(digest("adapter", seed)[:8], 16))
            self.network: Any = _network(transformer, file)
        for module in self.modules:
            beside = bool(file.bypass_mode) or not _is_fp32(module.org_module[0])
            module.bypass_mode = beside and not file.dora_wd  # DoRA changes the weight itself
        self.network.apply_to()
        self.network.to(device, torch.float32).requires_grad_(True).train()
        transformer.add_module(NAME, self.network)

    @property
    def modules(self) -> list[Any]:
        """LyCORIS's modules, one for each adapted layer."""
        return self.network.loras

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by the names of the file."""
        return list(self.network.named_parameters())

    def constants(self) -> dict[str, Tensor]:
        """What the file holds besides: the alpha of each module."""
        return {f"{module.lora_name}.alpha": module.alpha for module in self.modules}

    def state(self) -> dict[str, Tensor]:
        """Everything that the file holds, by LyCORIS's names: the live tensors, not copies."""
        return {**dict(self.named_parameters()), **self.constants()}

    def start_with_noise(self, share: float, seed: int) -> None:
        """Draw the factors that would begin as zero, so that each layer's change is `share` of its weight (norms).

        A LoKr whose larger factor is zero gets its first gradients there alone; this one gets them everywhere.
        """
        generator = torch.Generator().manual_seed(int(digest("adapter noise", seed)[:8], 16))
        with torch.no_grad():
            for module in self.modules:
                zeros = [parameter for parameter in module.parameters() if not bool(parameter.any())]
                for parameter in zeros:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                change = module.get_weight(module.shape).float().norm()
                weight = effective_weight(module.org_module[0], _own_forward(module)).float().norm()
                for parameter in zeros[:1]:
                    parameter.mul_(share * weight / change)

    @contextmanager
    def off(self) -> Iterator[None]:
        """In here the transformer is the untrained base."""
        patched = [(module.org_module[0], module.org_module[0].forward) for module in self.modules]
        for layer, _ in patched:
            del layer.forward
        try:
            yield
        finally:
            for layer, forward in patched:
                layer.forward = forward

    @contextmanager
    def strength(self, factor: float) -> Iterator[None]:
        """In here the change is `factor` times what it is."""
        before = self.network.multiplier
        self.network.set_multiplier(before * factor)
        try:
            yield
        finally:
            self.network.set_multiplier(before)

    def load(self, path: Path) -> None:
        """Take over what a file of LyCORIS holds. Raises UserError when it is of other layers or sizes."""
        load_tensors(path, self.state())


class AdapterOff(nn.Module):
    """The untrained base, as a model of its own to be asked: the transformer with the adapter switched off."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        self._adapter = [adapter]  # its parameters are no parameters of this

    def forward(self, **inputs: Any) -> Any:
        """As the transformer's forward."""
        (adapter,) = self._adapter
        with adapter.off():
            return adapter.transformer(**inputs)


def _network(transformer: Any, file: LycorisFile) -> Any:
    """LyCORIS's network on the layers that the file names. Its class is left as it was found."""
    from lycoris.wrapper import LycorisNetwork

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # its own handler writes to the screen
    before = {name: vars(LycorisNetwork)[name] for name in _CLASS_STATE}
    overrides = {name: own.model_dump(exclude_none=True) for name, own in file.module_algo_map.items()}
    try:
        LycorisNetwork.ENABLE_CONV = True
        LycorisNetwork.USE_FNMATCH = False
        LycorisNetwork.LORA_PREFIX = "lycoris"
        LycorisNetwork.TARGET_REPLACE_MODULE = list(file.target_module)
        LycorisNetwork.TARGET_REPLACE_NAME = list(file.target_name)
        LycorisNetwork.TARGET_EXCLUDE_NAME = [*file.exclude_name, LEFT_OUT]
        LycorisNetwork.MODULE_ALGO_MAP = {**overrides}
        LycorisNetwork.NAME_ALGO_MAP = {}
        return LycorisNetwork(
            transformer,
            multiplier=file.multiplier,
            lora_dim=file.rank,
            conv_lora_dim=file.rank,
            alpha=file.alpha,  # pyright: ignore[reportArgumentType]
            conv_alpha=file.alpha,  # pyright: ignore[reportArgumentType]
            network_module=file.algo,
            use_tucker=file.use_tucker,
            factor=file.factor,
            full_matrix=file.full_matrix,
            decompose_both=file.decompose_both,
            unbalanced_factorization=file.unbalanced_factorization,
            weight_decompose=file.dora_wd,
            wd_on_out=True,
            bypass_mode=file.bypass_mode,
            warn_on_unmatched=False,
        )
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)


def _is_fp32(layer: Any) -> bool:
    """Whether a layer is diffusers' own with fp32 weights, to which a small change can be added."""
    return type(layer) in (nn.Linear, nn.Conv2d) and layer.weight.dtype == torch.float32


def load_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a LyCORIS file into `targets`. Raises UserError when names or sizes differ."""
    fix = "use a file that was trained with the same lycoris_config on the same model"
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            names = set(file.keys())
            if odd := sorted(names ^ set(targets)):
                what = f"it is another adapter: {len(odd)} tensors are on one side only, such as {odd[0]}"
                raise UserError(Problem(str(path), what, fix))
            for name, target in targets.items():
                tensor = file.get_tensor(name)
                if tensor.shape != target.shape:
                    what = f"{name} is {list(tensor.shape)}, this run's is {list(target.shape)}"
                    raise UserError(Problem(str(path), what, fix))
                target.copy_(tensor)
    except OSError as error:
        raise UserError(Problem(str(path), f"it cannot be read: {error}", "name a .safetensors file")) from error
    except SafetensorError as error:
        raise UserError(Problem(str(path), f"it is no safetensors file: {error}", fix)) from error


def load_average(path: Path, adapter: Adapter, average: Mapping[str, Tensor]) -> None:
    """Copy into `average` what a file holds: one of ours, or SimpleTuner's ema_model.pt. Raises UserError."""
    if path.suffix != ".pt":
        load_tensors(path, {**average, **{name: value.clone() for name, value in adapter.constants().items()}})
        return
    fix = "name a .safetensors file of ema/, or an ema_model.pt with shadow_params"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)["shadow_params"]
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(Problem(str(path), f"it cannot be read as an average: {error}", fix)) from error
    if [tuple(tensor.shape) for tensor in held] != [tuple(tensor.shape) for tensor in average.values()]:
        raise UserError(Problem(str(path), "it is the average of another adapter", fix))
    with torch.no_grad():
        for target, tensor in zip(average.values(), held, strict=True):
            target.copy_(tensor)


# ---- merged into the weights ----


def _own_forward(module: Any) -> Any:
    """What a layer computes without its adapter."""
    layer = module.org_module[0]
    return type(layer).forward.__get__(layer)


@torch.no_grad()
def merged(adapter: Adapter) -> dict[str, Tensor]:
    """The transformer's weights with the adapter in them, fp32: what any program loads as an ordinary Sana.

    Each is what the adapted layer does to unit inputs, so that it is right for every algorithm by construction.
    """
    state = {name: value for name, value in adapter.transformer.state_dict().items() if not name.startswith(f"{NAME}.")}
    names = {id(module): name for name, module in adapter.transformer.named_modules()}
    for module in adapter.modules:
        layer = module.org_module[0]
        change = effective_weight(layer, layer.forward) - effective_weight(layer, _own_forward(module))
        name = f"{names[id(layer)]}.weight"
        state[name] = (state[name].double() + change.double()).to(state[name].dtype)
    return state


@torch.no_grad()
def effective_weight(layer: Any, forward: Any) -> Tensor:
    """The matrix of a linear layer or 1×1 convolution, [out, in(, 1, 1)], by what a forward makes of unit inputs."""
    pointwise = isinstance(layer, nn.Conv2d)
    inputs = layer.in_channels if pointwise else layer.in_features
    dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.float32
    units = torch.eye(inputs, dtype=dtype, device=layer.weight.device)
    if pointwise:
        found = forward(units[:, :, None, None]) - forward(torch.zeros_like(units[:1, :, None, None]))
        return found.transpose(0, 1).contiguous()
    return (forward(units) - forward(torch.zeros_like(units[:1]))).T.contiguous()
