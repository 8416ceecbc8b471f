"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sana_tune.train.ema import Ema, NoEma, ramped


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
    ema.reset()
    ema.load_state_dict({})
    assert ema.state_dict() == {}
    assert [suffix for suffix, _ in ema.views()] == [""]
    with ema.swapped():
        pass
