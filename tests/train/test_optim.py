"""Optimizers by name: defaults, groups, Kahan's seed, and every one of them through a checkpoint."""

from __future__ import annotations

import io
import logging

import optimi
import pytest
import torch
from torch import nn

from sana_tune.config.optimizers import OPTIMIZER_FACTS, options_of, own_settings, state_bytes
from sana_tune.train.optim import (
    build_optimizer,
    load_optimizer_state,
    parameter_groups,
    seed_kahan,
)
from sana_tune.train.rounding import Rounded, place
from tests.train.params import copies, give_gradients, parameters, push, same

NAMES = list(OPTIMIZER_FACTS)
DTYPES = [torch.float32, torch.bfloat16]


def built(name: str, named: dict[str, nn.Parameter], lr: float = 1e-3, **settings) -> torch.optim.Optimizer:
    return build_optimizer(name, parameter_groups(named.items()), lr, **settings)


def saved(optimizer: torch.optim.Optimizer) -> dict:
    """The state through a file, as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_table_is_built_with_its_defaults(name: str):
    group = built(name, parameters()).param_groups[0]
    own = own_settings(name)
    betas = group.get("betas") or tuple(group[key] for key in ("beta1", "beta2", "beta3") if key in group)
    assert tuple(betas[: len(OPTIMIZER_FACTS[name].betas)]) == OPTIMIZER_FACTS[name].betas
    assert group["weight_decay"] == own["weight_decay"] and group["lr"] == 1e-3
    assert "eps" not in own or group["eps"] == own["eps"]


def test_given_values_win_each_on_its_own():
    group = built("optimi-adamw", parameters(), betas=(None, 0.95), weight_decay=0.2, eps=1e-9).param_groups[0]
    assert (group["beta1"], group["beta2"], group["weight_decay"], group["eps"]) == (0.9, 0.95, 0.2, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_reaches_the_optimizer(name: str):
    changes = {
        "bool": lambda value: not value,
        "int": lambda value: value + 2,
        "float": lambda value: value / 2 + 0.2 if value < 1 else value + 0.5,
    }
    for key, default in options_of(name).items():
        if key == "kahan_sum":
            continue
        value = -0.5 if key == "beta2_decay" else changes[type(default).__name__](default)
        more = {"momentum": 0.9} if key == "nesterov" else {}
        optimizer = built(name, parameters(), options={key: value, **more})
        group = optimizer.param_groups[0]
        if key == "min_8bit_size":
            assert optimizer.args.min_8bit_size == value  # type: ignore[attr-defined]
        elif key.startswith("beta") and key not in group and key != "beta2_decay":
            assert group["betas"][int(key[4:]) - 1] == value
        else:
            assert group[key] == value


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        build_optimizer("adamw", parameters().values(), 1e-3)


def test_norms_biases_and_tables_do_not_decay():
    named = parameters()
    named["frozen.weight"] = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    decays, others = parameter_groups(named.items())
    assert [len(group["params"]) for group in (decays, others)] == [3, 2] and others["weight_decay"] == 0.0
    assert len(parameter_groups([("only.bias", nn.Parameter(torch.zeros(2)))])) == 1, "an empty group is none"
    assert decays["params"][0] is named["linear.weight"] and others["params"][0] is named["scale_shift_table"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch-adafactor"])
def test_decay_moves_weights_alone(name: str):
    """Adafactor's step depends on the size of the weights, so that it cannot be told from decay."""
    moved = []
    for decay in (0.0, 0.5):
        named = parameters()
        push(named, built(name, named, weight_decay=decay), 2)
        moved.append(named)
    plain, decayed = moved
    assert torch.equal(plain["linear.bias"], decayed["linear.bias"])
    assert torch.equal(plain["scale_shift_table"], decayed["scale_shift_table"])
    assert not torch.equal(plain["linear.weight"], decayed["linear.weight"])
    assert not torch.equal(plain["conv.weight"], decayed["conv.weight"])


def test_frozen_parameters_are_left_out():
    named = list(parameters().values())
    named[1].requires_grad_(False)
    group = build_optimizer("optimi-adamw", named, 1e-3).param_groups[0]
    assert len(group["params"]) == 4 and group["params"][0] is named[0]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("optimi-adamw", lambda p: optimi.AdamW(p, 1e-3, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6)),
        ("optimi-lion", lambda p: optimi.Lion(p, 1e-3)),
        ("optimi-adan", lambda p: optimi.Adan(p, 1e-3, betas=(0.98, 0.92, 0.999))),
        ("torch-adamw", lambda p: torch.optim.AdamW(p, 1e-3)),
        ("torch-adafactor", lambda p: torch.optim.Adafactor(p, 1e-3)),
    ],
)
def test_it_is_the_librarys(name: str, theirs):
    ours, others = parameters(), parameters()
    push(ours, build_optimizer(name, ours.values(), 1e-3), 5)
    push(others, theirs(list(others.values())), 5)
    for key in ours:
        torch.testing.assert_close(ours[key], others[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_goes_on_bit_for_bit_through_a_weights_only_file(name: str, dtype: torch.dtype):
    straight, options = parameters(dtype), {"momentum": 0.9} if name.endswith("-sgd") else {}
    optimizer = built(name, straight, options=options)
    if dtype == torch.bfloat16:
        seed_kahan(optimizer, list(straight.values()), [each.detach().float() for each in straight.values()])
    push(straight, optimizer, 3)
    resumed = copies(straight)
    other = built(name, resumed, options=options)
    load_optimizer_state(other, saved(optimizer))
    assert same(straight, resumed)
    push(straight, optimizer, 3, start=3)
    push(resumed, other, 3, start=3)
    assert same(straight, resumed)
    assert not same(straight, parameters(dtype)), "it moved"
    kinds = {tensor.dtype for tensor in straight.values()}
    assert kinds == {dtype}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_take_the_bytes_of_the_table(name: str, dtype: torch.dtype):
    named = {"weight": nn.Parameter(torch.randn(512, 512).to(dtype))}
    optimizer = built(name, named)
    push(named, optimizer, 1)
    state = next(iter(optimizer.state.values()), {})
    tensors = [value for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key]
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 512**2
    told = state_bytes(name.removesuffix("-paged"), {}, "bf16" if dtype == torch.bfloat16 else "fp32")
    if name == "torch-adafactor":  # this one is factored; 1x1 convolutions, half of Sana, are not
        named = {"weight": nn.Parameter(torch.randn(512, 512, 1, 1).to(dtype))}
        whole = built(name, named)
        push(named, whole, 1)
        (state,) = whole.state.values()
        found = (found + sum(state[key].numel() for key in ("row_var", "col_var")) * 4 / 512**2) / 2
    assert found == pytest.approx(told, rel=0.02, abs=0.01)


def test_fp32_states_of_bf16_weights_stay_fp32_through_loading():
    """torch's own loading would cast them to the weights' dtype."""
    named = parameters(torch.bfloat16)
    optimizer = built("torch-adamw", named)
    push(named, optimizer, 2)
    other = built("torch-adamw", copies(named))
    load_optimizer_state(other, saved(optimizer))
    assert {state["exp_avg"].dtype for state in other.state.values()} == {torch.float32}


def test_settings_are_todays_and_not_the_checkpoints():
    named = parameters()
    optimizer = built("optimi-adamw", named, weight_decay=0.1, betas=(0.8, 0.9))
    push(named, optimizer, 2)
    other = built("optimi-adamw", named, weight_decay=0.3, betas=(0.7, 0.95), lr=5e-4)
    load_optimizer_state(other, saved(optimizer))
    for number, group in enumerate(other.param_groups):
        assert (group["beta1"], group["beta2"], group["lr"]) == (0.7, 0.95, 5e-4)
        assert group["weight_decay"] == (0.0 if number else 0.3)
        assert int(group["step"]) == 2 and group["setup"]


def test_state_of_another_model_is_refused():
    optimizer = built("optimi-adamw", parameters())
    fewer = parameters()
    del fewer["conv.weight"]
    with pytest.raises(ValueError, match=r"\[3, 2\] parameters, this run's \[2, 2\]"):
        load_optimizer_state(built("optimi-adamw", fewer), optimizer.state_dict())


def test_state_written_by_triton_kernels_runs_without_them():
    """What optimi holds on CUDA: the flag, and one placeholder per fp32 parameter."""
    for name in ("optimi-adamw", "optimi-stableadamw", "optimi-sgd", "optimi-lion"):
        named = parameters()
        optimizer = built(name, named)
        push(named, optimizer, 1)
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group["triton"] = True
        for held in state["state"].values():
            held["kahan_comp"] = torch.zeros(1, dtype=torch.uint8)
            if name == "optimi-sgd":
                held["exp_avg"] = torch.zeros(1)
        load_optimizer_state(optimizer, state)
        assert not optimizer.param_groups[0]["triton"]
        assert all(optimizer.state[parameter]["kahan_comp"] is None for parameter in named.values())
        push(named, optimizer, 1)


def test_paged_optimizers_say_that_a_cpu_pages_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="sana_tune"):
        logging.getLogger("sana_tune").propagate = True
        optimizer = built("bnb-lion8bit-paged", parameters())
    assert type(optimizer).__name__ == "Lion8bit"
    assert "on a CPU there is nothing to page; bnb-lion8bit is used" in caplog.text


# ---- bf16 weights ----


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_move_by_steps_that_rounding_would_hold(name: str):
    """A bf16 weight just below 1 has its neighbours 2^-8 away: steps of 1e-5 never get there by rounding alone.

    On average they go as far as fp32 weights do; Kahan's remainders are counted.
    """
    rate = 1e-3 if name.endswith("-sgd") else 1e-5

    def moved(dtype: torch.dtype) -> float:
        parameter = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = build_optimizer(name, [parameter], rate)
        assert isinstance(optimizer, Rounded) is (dtype == torch.bfloat16 and name not in KAHAN)
        for step in range(150):
            parameter.grad = torch.full_like(parameter, 0.01)
            place(optimizer, step)
            optimizer.step()
        rest = optimizer.state[parameter].get("kahan_comp")
        return (parameter.double() - 1 + (0 if rest is None else rest.double())).mean().item()

    there, reached = moved(torch.float32), moved(torch.bfloat16)
    assert there < -3e-4 or name == "torch-adafactor"
    assert reached == pytest.approx(there, rel=0.1)


def test_without_kahan_they_do_not_move():
    parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = build_optimizer("optimi-adamw", [parameter], 1e-5, options={"kahan_sum": False})
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert (parameter == 1).all()


KAHAN = [name for name, facts in OPTIMIZER_FACTS.items() if facts.keeps == "kahan"]


@pytest.mark.parametrize("name", KAHAN)
def test_kahan_starts_with_what_rounding_lost(name: str):
    full = parameters()
    named = {key: nn.Parameter(weight.detach().to(torch.bfloat16)) for key, weight in full.items()}
    optimizer = built(name, named, lr=1e-12, weight_decay=0.0)
    seed_kahan(optimizer, list(named.values()), [weight.detach() for weight in full.values()])
    push(named, optimizer, 1)
    lost = max((named[key].float() - full[key]).abs().max() for key in named)
    assert lost > 1e-4, "bf16 is not fp32"
    for key, parameter in named.items():
        seen = parameter.float() + optimizer.state[parameter]["kahan_comp"].float()
        assert (seen - full[key]).abs().max() < 1e-2 * lost


@pytest.mark.parametrize("name", KAHAN)
def test_a_seed_of_nothing_changes_nothing(name: str):
    """All of the state's keys are there, as optimi itself would make them."""
    plain, seeded = parameters(torch.bfloat16), parameters(torch.bfloat16)
    one, other = built(name, plain), built(name, seeded)
    seed_kahan(other, list(seeded.values()), [weight.detach().float() for weight in seeded.values()])
    push(plain, one, 3)
    push(seeded, other, 3)
    assert same(plain, seeded)
    assert [set(state) for state in one.state.values()] == [set(state) for state in other.state.values()]


def test_the_learning_rate_reaches_every_group_after_loading():
    named = parameters()
    optimizer = built("optimi-adamw", named, release=True)
    load_optimizer_state(optimizer, saved(optimizer))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copies(named)
    give_gradients(named, 0)
    push(named, optimizer, 1)
    assert same(before, named)
