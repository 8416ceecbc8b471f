"""The moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event

import pytest
import torch
from torch import nn

from sana_tune.train.ema import Copies, Ema, NoEma, ramped


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def shake(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def test_the_ramp():
    assert ramped(0.995, 1) == 2 / 11
    assert ramped(0.995, 10) == 11 / 20
    assert ramped(0.995, 100_000) == 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_follows_the_formula_in_fp32(dtype: torch.dtype):
    net = model(dtype)
    ema = Ema(net.named_parameters(), 0.9)
    expected = {name: parameter.detach().double().clone() for name, parameter in net.named_parameters()}
    for step in range(1, 30):
        shake(net, step)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    state = ema.state_dict()
    assert list(state) == [name for name, _ in net.named_parameters()]
    for name, average in state.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_an_interval_compensates_the_decay():
    net = model()
    ema = Ema(net.named_parameters(), 0.5, interval=4)
    before = ema.state_dict()["0.weight"].clone()
    shake(net, 1)
    for step in (101, 102, 103):
        ema.update(step)
    assert torch.equal(ema.state_dict()["0.weight"], before)
    ema.update(104)
    share = 1 - 0.5**4
    torch.testing.assert_close(ema.state_dict()["0.weight"], before + share * (net[0].weight.detach() - before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_shows_the_average_and_gives_the_weights_back(dtype: torch.dtype):
    net = model(dtype)
    ema = Ema(net.named_parameters(), 0.5)
    for step in range(1, 4):
        shake(net, step)
        ema.update(step)
    own = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    parameters = list(net.parameters())
    average = {name: value.clone() for name, value in ema.state_dict().items()}
    with pytest.raises(RuntimeError), ema.swapped():
        assert all(torch.equal(p, average[name].to(dtype)) for name, p in net.named_parameters())
        assert not torch.equal(net[0].weight, own["0.weight"])
        raise RuntimeError
    assert all(torch.equal(parameter, own[name]) for name, parameter in net.named_parameters())
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert all(torch.equal(value, average[name]) for name, value in ema.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_state_goes_there_and_back():
    net = model()
    ema = Ema(net.named_parameters(), 0.5)
    shake(net, 1)
    ema.update(1)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    other = Ema(net.named_parameters(), 0.5)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    other.reset()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(KeyError):
        other.load_state_dict({"0.weight": state["0.weight"]})


def test_it_starts_as_a_copy():
    net = model()
    ema = Ema(net.named_parameters(), 0.5)
    assert ema.state_dict()["0.weight"].data_ptr() != net[0].weight.data_ptr()


def test_views_name_the_weights():
    net = model()
    ema = Ema(net.named_parameters(), 0.5)
    shake(net, 1)
    ema.update(1)
    seen = {}
    for suffix, weights in ema.views():
        with weights:
            seen[suffix] = net[0].weight.detach().clone()
    assert list(seen) == ["", "_ema"] and not torch.equal(seen[""], seen["_ema"])


def test_no_ema_does_nothing():
    ema = NoEma()
    ema.update(1)
    ema.fence()
    ema.reset()
    ema.load_state_dict({})
    assert ema.state_dict() == {}
    assert [suffix for suffix, _ in ema.views()] == [""]
    with ema.swapped():
        pass


# ---- warm-up ----


@pytest.mark.parametrize("interval", [1, 3])
def test_through_the_warm_up_the_average_is_the_weights_then_the_decay_is_fixed(interval: int):
    net = model()
    ema = Ema(net.named_parameters(), 0.5, interval, warmup=4)
    for step in range(1, 5):
        shake(net, step)
        ema.update(step)
    assert torch.equal(ema.state_dict()["0.weight"], net[0].weight)
    before = ema.state_dict()["0.weight"].clone()
    shake(net, 5)
    for step in (5, 6):
        ema.update(step)
    share = 1 - 0.5**interval
    expected = before + share * (net[0].weight.detach() - before)
    if interval == 1:  # both steps move it
        expected = expected + share * (net[0].weight.detach() - expected)
    torch.testing.assert_close(ema.state_dict()["0.weight"], expected)


def test_shares_by_step():
    net = model()
    plain = Ema(net.named_parameters(), 0.9, 2)
    assert [plain.share(step) for step in (1, 2, 3)] == [0.0, 1 - (3 / 12) ** 2, 0.0]
    warm = Ema(net.named_parameters(), 0.9, 2, warmup=3)
    assert [warm.share(step) for step in range(1, 7)] == pytest.approx([0.0, 1.0, 1.0, 1 - 0.81, 0.0, 1 - 0.81])


# ---- in main memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_main_memory_it_is_the_same_average_to_the_bit(dtype: torch.dtype):
    one, other = model(dtype), model(dtype)
    beside, aside = Ema(one.named_parameters(), 0.9), Ema(other.named_parameters(), 0.9, place="cpu")
    for step in range(1, 20):
        for net, ema in ((one, beside), (other, aside)):
            shake(net, step)
            ema.update(step)
            ema.fence()
    expected = beside.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in aside.state_dict().items())
    assert not torch.equal(expected["0.weight"], one[0].weight.float())


def test_the_step_does_not_wait_for_the_average():
    """What the thread does takes as long as we like; the weights move meanwhile, and the average is of the copies."""
    net = model()
    weights = [parameter.detach() for parameter in net.parameters()]
    copies, go_on, seen = Copies(weights), Event(), []

    def use(held: Sequence[torch.Tensor]) -> None:
        assert go_on.wait(60)
        seen.append(held[0].clone())

    before = weights[0].clone()
    copies.take(use)
    copies.fence()
    shake(net, 1)
    assert seen == []
    go_on.set()
    copies.settle()
    assert torch.equal(seen[0], before) and not torch.equal(weights[0], before)
    copies.take(use)
    copies.settle()
    assert torch.equal(seen[1], weights[0])


def test_what_fails_in_the_thread_is_told():
    copies = Copies([torch.ones(2)])

    def fail(held: Sequence[torch.Tensor]) -> None:
        raise ArithmeticError("no average")

    copies.take(fail)
    with pytest.raises(ArithmeticError, match="no average"):
        copies.settle()
    copies.settle()


def test_reading_it_waits_for_the_thread():
    """state_dict, swapped, reset and load_state_dict come after the update before them."""
    net = model()
    ema = Ema(net.named_parameters(), 0.5, place="cpu")
    shake(net, 1)
    ema.update(100)
    expected = 0.5 * (model()[0].weight.detach() + net[0].weight.detach())
    with ema.swapped():
        torch.testing.assert_close(net[0].weight.detach(), expected)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    shake(net, 2)
    ema.update(101)
    ema.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in ema.state_dict().items())
    ema.update(102)
    ema.reset()
    assert torch.equal(ema.state_dict()["0.weight"], net[0].weight)


# ---- what is shown ----


@pytest.mark.parametrize(("shown", "expected"), [("comparison", ["", "_ema"]), ("ema_only", ["_ema"]), ("none", [""])])
def test_which_weights_are_shown(shown: str, expected: list[str]):
    ema = Ema(model().named_parameters(), 0.5, shown=shown)  # type: ignore[arg-type]
    assert [suffix for suffix, _ in ema.views()] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (--gpu)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_copies_are_of_the_weights_before_they_move(dtype: torch.dtype):
    """Weights that move right after `fence`, on a device that is busy: the average is as if everything had waited."""
    made = [torch.nn.Linear(2048, 2048, device="cuda", dtype=dtype) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    averages = [Ema(made[0].named_parameters(), 0.9), Ema(made[1].named_parameters(), 0.9, place="cpu")]
    work = torch.randn(4096, 4096, device="cuda")
    for step in range(1, 20):
        change = torch.randn(2048, 2048, device="cuda", dtype=dtype)
        for net, ema in zip(made, averages, strict=True):
            for _ in range(5):
                work = work @ work / 64
            ema.fence()
            with torch.no_grad():
                net.weight.add_(change)
            ema.update(step)
    expected, found = (ema.state_dict() for ema in averages)
    assert all(found[name].device.type == "cpu" for name in found)
    assert all(torch.allclose(found[name], expected[name].cpu(), rtol=1e-6, atol=1e-6) for name in found)
