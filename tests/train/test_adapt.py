"""The adapter on its frozen base: it starts as the base, learns everywhere, goes off, and comes back from its file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import create_lycoris_from_weights
from lycoris.wrapper import LycorisNetwork
from safetensors.torch import save_file
from torch import Tensor

from sana_tune.config.lycoris import LycorisFile, lycoris_of
from sana_tune.errors import UserError
from sana_tune.model.attention import install
from sana_tune.train.adapt import NAME, Adapter, AdapterOff, effective_weight, load_average, load_tensors, merged
from tests.train.toys import CHANNELS, TEXT_WIDTH, tiny_transformer

KINDS: dict[str, dict[str, Any]] = {
    "whole": {"full_matrix": True, "factor": 4},
    "ranked": {"linear_dim": 2, "linear_alpha": 5, "factor": 4, "multiplier": 0.5},
    "loha": {"algo": "loha", "linear_dim": 3, "linear_alpha": 1.5},
    "locon": {"algo": "locon", "linear_dim": 3, "linear_alpha": 6},
}


def file_of(**content: Any) -> LycorisFile:
    return lycoris_of({"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, **content}, "f")


def frozen(dtype: torch.dtype = torch.float32) -> Any:
    model: Any = tiny_transformer().requires_grad_(False).to(dtype)
    install(model)
    return model.eval()


def predicted(model: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = model.proj_out.weight.dtype
    latents = torch.randn(2, CHANNELS, 4, 4, generator=generator).to(dtype)
    text = torch.randn(2, 5, TEXT_WIDTH, generator=generator).to(dtype)
    time = torch.tensor([100.0, 800.0])
    return model(hidden_states=latents, encoder_hidden_states=text, timestep=time, return_dict=False, **options)[0]


def moved(adapter: Adapter, size: float = 0.05) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_every_parameter_learns(kind: str):
    model = frozen()
    before = predicted(model)
    adapter = Adapter(model, file_of(**KINDS[kind]))
    assert torch.allclose(predicted(model), before, rtol=1e-5, atol=1e-6)
    moved(adapter)
    predicted(model).square().mean().backward()
    without = [
        name for name, parameter in adapter.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == [] and len(adapter.modules) == 20
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"{NAME}.{name}" for name, _ in adapter.named_parameters()}, "the base is frozen"


def test_lycoris_is_left_as_it_was():
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    Adapter(
        frozen(),
        file_of(apply_preset={"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 2}}}),
    )
    with pytest.raises(ValueError):
        Adapter(frozen(), file_of().model_copy(update={"factor": "none"}))
    assert {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()} == before


def test_off_is_the_base_to_the_bit_and_on_again():
    model = frozen()
    base = predicted(model)
    adapter = moved(Adapter(model, file_of(factor=4)))
    with_it = predicted(model)
    with adapter.off():
        assert torch.equal(predicted(model), base)
    assert torch.equal(predicted(model), with_it) and not torch.allclose(with_it, base)
    off = AdapterOff(adapter)
    assert list(off.parameters()) == []
    generator = torch.Generator().manual_seed(3)
    inputs = {"hidden_states": torch.randn(2, CHANNELS, 4, 4, generator=generator)}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, TEXT_WIDTH, generator=generator)
    assert torch.equal(off(**inputs, timestep=torch.tensor([100.0, 800.0]), return_dict=False)[0], base)


def test_strength_scales_the_change():
    model = frozen()
    base = predicted(model).detach()
    adapter = moved(Adapter(model, file_of(factor=4, multiplier=0.5)), 1e-3)
    whole = (predicted(model) - base).norm()
    with adapter.strength(0.5):
        half = (predicted(model) - base).norm()
    with adapter.strength(0.0):
        assert torch.allclose(predicted(model), base, atol=1e-6)
    assert 0.45 < half / whole < 0.55 and adapter.network.multiplier == 0.5


def test_on_a_bf16_base_small_changes_are_not_rounded_away():
    """A change of 1e-5 beside weights of 0.1 is below bf16's steps: added to the weight it would be nothing."""
    model = frozen(torch.bfloat16)
    base = predicted(model).float()
    adapter = moved(Adapter(model, file_of(full_matrix=True, factor=4, bypass_mode=False)), 1e-4)
    exact = frozen()
    exact_base = predicted(exact)
    other = moved(Adapter(exact, file_of(full_matrix=True, factor=4)), 1e-4)
    assert all(module.bypass_mode for module in adapter.modules) and not any(
        module.bypass_mode for module in other.modules
    )
    layer, twin = adapter.modules[0], other.modules[0]
    x = torch.randn(4, layer.shape[1])
    got = layer.bypass_forward_diff(x) if layer.bypass_mode else None
    want = x @ twin.get_weight(twin.shape).T
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-9) and want.abs().max() < 1e-3
    assert all(parameter.dtype == torch.float32 for _, parameter in adapter.named_parameters())
    assert base.shape == exact_base.shape


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_of_computing_agree(kind: str):
    """1×1 convolutions among the layers: beside the layer, and in its weight."""
    results = []
    for bypass in (False, True):
        model = frozen()
        moved(Adapter(model, file_of(**KINDS[kind], bypass_mode=bypass)))
        results.append(predicted(model))
    assert torch.allclose(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_own_loader_reads_the_file_back(kind: str, tmp_path: Path):
    file = file_of(**KINDS[kind])
    model = frozen()
    adapter = moved(Adapter(model, file))
    assert set(adapter.state()) == set(adapter.network.state_dict())
    save_file({name: value.detach().clone() for name, value in adapter.state().items()}, tmp_path / "a.safetensors")
    other = frozen()
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(file.multiplier, str(tmp_path / "a.safetensors"), other)
    network.apply_to()
    assert torch.allclose(predicted(other), predicted(model), rtol=1e-4, atol=1e-5)
    third = frozen()
    again = Adapter(third, file, seed=9)
    again.load(tmp_path / "a.safetensors")
    assert torch.equal(predicted(third), predicted(model))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_what_the_adapted_layers_do(kind: str):
    model = frozen()
    adapter = moved(Adapter(model, file_of(**KINDS[kind])))
    state = merged(adapter)
    plain = frozen()
    changed = [name for name, value in plain.state_dict().items() if not torch.equal(value, state[name])]
    plain.load_state_dict(state)
    assert torch.allclose(predicted(plain), predicted(model), rtol=1e-4, atol=1e-5)
    assert len(changed) == len(adapter.modules) and all(name.endswith(".weight") for name in changed)


def test_the_weight_of_a_layer_is_found_from_what_it_does():
    for layer in (torch.nn.Linear(5, 3), torch.nn.Conv2d(5, 3, 1)):
        found = effective_weight(layer, layer.forward)
        assert found.shape == layer.weight.shape and torch.allclose(found, layer.weight, atol=1e-6)


def test_it_begins_with_noise_of_the_size_that_is_asked_for():
    model = frozen()
    adapter = Adapter(model, file_of(full_matrix=True, factor=4))
    adapter.start_with_noise(1e-2, seed=1)
    for module in adapter.modules:
        change = module.get_weight(module.shape).detach().norm()
        assert float(change / module.org_module[0].weight.norm()) == pytest.approx(1e-2, rel=1e-3)
    other = Adapter(frozen(), file_of(full_matrix=True, factor=4))
    other.start_with_noise(1e-2, seed=1)
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(adapter.named_parameters(), other.named_parameters(), strict=True)
    )


def test_the_seed_alone_decides_what_it_begins_with():
    torch.manual_seed(1)
    one = Adapter(frozen(), file_of(factor=4), seed=4)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = Adapter(frozen(), file_of(factor=4), seed=4)
    three = Adapter(frozen(), file_of(factor=4), seed=5)
    values = [[value for _, value in each.named_parameters()] for each in (one, two, three)]
    assert all(map(torch.equal, values[0], values[1])) and not all(map(torch.equal, values[0], values[2]))
    assert before.shape == torch.get_rng_state().shape


def test_files_of_other_adapters_are_refused(tmp_path: Path):
    adapter = Adapter(frozen(), file_of(full_matrix=True, factor=4))
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        adapter.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="no safetensors file"):
        adapter.load(path)
    for factor, part in ((2, r"this run's is"), (None, "it is another adapter")):
        kind = {"factor": factor, "full_matrix": True} if factor else {"algo": "loha", "linear_dim": 2}
        other = Adapter(frozen(), file_of(**kind))
        save_file({name: value.detach().clone() for name, value in other.state().items()}, path)
        with pytest.raises(UserError, match=part):
            load_tensors(path, adapter.state())


def test_an_average_is_read_from_our_file_and_from_simpletuners(tmp_path: Path):
    adapter = moved(Adapter(frozen(), file_of(full_matrix=True, factor=4)))
    held = {name: value.detach().clone() for name, value in adapter.named_parameters()}
    save_file({**held, **adapter.constants()}, tmp_path / "a.safetensors")
    torch.save({"shadow_params": list(held.values()), "decay": 0.9}, tmp_path / "ema_model.pt")
    for name in ("a.safetensors", "ema_model.pt"):
        average = {key: torch.zeros_like(value) for key, value in held.items()}
        load_average(tmp_path / name, adapter, average)
        assert all(torch.equal(average[key], held[key]) for key in held)
    torch.save({"shadow_params": [torch.zeros(2)]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="average of another adapter"):
        load_average(tmp_path / "other.pt", adapter, held)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="cannot be read as an average"):
        load_average(tmp_path / "bad.pt", adapter, held)
