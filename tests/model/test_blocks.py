"""Blocks are recomputed and compiled as asked, with the same result, and compiling fails loudly and harmlessly."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sana_tune.log import log
from sana_tune.model.attention import install
from sana_tune.model.blocks import arrange, sample
from sana_tune.model.facts import recomputed_blocks
from tests.fixtures import tiny_transformer

LAYERS = 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name == log.name]


def model_of(layers: int = LAYERS, qk_norm: bool = False):
    torch.manual_seed(0)
    model = tiny_transformer(layers=layers, qk_norm=qk_norm).train()
    install(model)
    return model


def backward(model, size=(2, 3), batch=2, tokens=8, masked=True) -> list[Tensor]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(sum(size) + tokens)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, -2:] = 0
    model.zero_grad()
    out = model(
        torch.randn(batch, 32, *size, generator=generator),
        encoder_hidden_states=torch.randn(batch, tokens, 32, generator=generator),
        encoder_attention_mask=mask if masked else None,
        timestep=torch.linspace(300.0, 700.0, batch),
        return_dict=False,
    )[0]
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def same(found: list[Tensor], expected: list[Tensor], bound: float = 0.0) -> bool:
    """Whether two answers are the same: to the bit, or to a share of the largest gradient."""
    if not bound:
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    limit = bound * max(float(b.abs().max()) for b in expected[1:])
    return torch.allclose(found[0], expected[0], rtol=bound, atol=bound) and all(
        float((a - b).abs().max()) <= limit for a, b in zip(found[1:], expected[1:], strict=True)
    )


class Calls:
    """Which blocks run, in order, again ones too."""

    def __init__(self, model):
        self.found: list[int] = []
        self.handles = [
            block.attn1.register_forward_hook(lambda *_, place=place: self.found.append(place))
            for place, block in enumerate(model.transformer_blocks)
        ]


@pytest.mark.parametrize(
    ("interval", "stride", "expected"),
    [
        (1, None, [0, 1, 2, 3, 4, 5, 6]),
        (2, None, [0, 2, 4, 6]),
        (3, None, [0, 3, 6]),
        (9, None, [0]),
        (1, 3, [0, 3, 6]),
        (2, 3, [0, 1, 3, 4, 6]),
        (2, 5, [0, 1, 5, 6]),
        (3, 3, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_blocks_of_interval_and_stride_are_recomputed_and_no_others(interval, stride, expected):
    model = model_of(7)
    names, plain = list(model.state_dict()), backward(model)
    wanted = recomputed_blocks(7, interval, stride)
    assert [place for place, again in enumerate(wanted) if again] == expected
    arrange(model, wanted)
    calls = Calls(model)
    assert same(backward(model), plain), "to the bit"
    assert calls.found[:7] == list(range(7)) and sorted(calls.found[7:]) == expected
    assert list(model.state_dict()) == names
    assert arrange(model) is None
    calls.found.clear()
    assert same(backward(model), plain) and calls.found == list(range(7)), "switched off again"


def products(model) -> Counter[str]:
    found: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found[function._overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Count():
        backward(model)
    return found


def test_selective_recomputes_all_but_the_matrix_products():
    model = model_of()
    plain, once = backward(model), products(model)
    arrange(model, (True,) * LAYERS)
    every = products(model)
    assert same(backward(model), plain)
    arrange(model, (True,) * LAYERS, selective=True)
    selective = products(model)
    assert same(backward(model), plain), "to the bit"
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name in ("mm", "addmm", attention):
        assert selective[name] == once[name], f"{name} is not computed again"
    assert (
        sum(every[name] for name in ("mm", "addmm", attention)) - sum(once[name] for name in ("mm", "addmm", attention))
        == LAYERS * 11
    ), "whole blocks but for the last product, which nothing needs: ten others, and softmax attention"
    for name in ("convolution", "native_layer_norm", "silu"):
        assert selective[name] > once[name], f"{name} is computed again"


def test_selective_keeps_less_than_all_and_more_than_the_inputs():
    model = model_of()

    def kept(recomputed, selective) -> int:
        arrange(model, recomputed, selective=selective)
        found = {}

        class Births(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, tuple | list) else (out,):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
                return out

        with Births():
            out = model(
                torch.randn(2, 32, 8, 8),
                encoder_hidden_states=torch.randn(2, 8, 32),
                timestep=torch.tensor([1.0, 2.0]),
                return_dict=False,
            )[0]
        assert out.grad_fn is not None
        return sum(size for storage, size in found.values() if not storage.expired())

    every, inputs = (True,) * LAYERS, kept((True,) * LAYERS, False)
    assert 2 * inputs < kept(every, True) < 0.6 * kept((), False)


# ---- compiling; dynamo without a code generator, which takes minutes (the inductor's own test is a long one) ----


@pytest.mark.parametrize(
    "recomputed", [(), (True, False, True, False), (True,) * 4], ids=["kept", "every other", "recomputed"]
)
def test_compiled_blocks_give_the_same_and_each_size_is_compiled_once(recomputed, told):
    model, plain = model_of(), model_of()
    counter = CompileCounterWithBackend("eager")
    blocks = arrange(model, recomputed, compiler=counter, sizes=4)
    assert blocks is not None and blocks.compiled
    sizes, counts = [(2, 3), (3, 2), (4, 5), (5, 3)], []
    for size in (*sizes, *sizes):
        for tokens in (8, 16):
            assert same(backward(model, size, tokens=tokens), backward(plain, size, tokens=tokens), 1e-5)
        counts.append(counter.frame_count)
    kinds = len(set(recomputed or (False,)))
    assert counts == [2 * kinds * number for number in (1, 2, 3, 4, 4, 4, 4, 4)], "one form for each size and length"
    assert blocks.compiled and not told()
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_is_compiled_once_for_all_of_its_kind(qk_norm, told):
    model, plain = model_of(6, qk_norm), model_of(6, qk_norm)
    counter = CompileCounterWithBackend("eager")
    arrange(model, compiler=counter)
    for _ in range(2):
        assert same(backward(model), backward(plain), 1e-5)
    assert counter.frame_count == 1 and not told()


def test_drawing_does_not_use_the_compiled_blocks():
    model = model_of()
    counter = CompileCounterWithBackend("eager")
    arrange(model, (True,) * LAYERS, compiler=counter)
    with torch.no_grad():
        model(torch.randn(1, 32, 2, 2), torch.randn(1, 8, 32), torch.tensor([5.0]), return_dict=False)
    assert counter.frame_count == 0


def broken(graph, inputs):
    raise RuntimeError("no compiler on this machine\nand a long story")


def test_when_compiling_fails_that_is_said_once_and_training_goes_on(told):
    model, plain = model_of(), model_of()
    blocks = arrange(model, (True,) * LAYERS, compiler=broken)
    assert blocks is not None
    for _ in range(2):
        assert same(backward(model), backward(plain))
    (message,) = told()
    assert message.startswith("dynamo_backend: the blocks could not be compiled and run as they are, which is slower (")
    assert message.endswith("raised: RuntimeError: no compiler on this machine)") and "long story" not in message
    assert not blocks.compiled


def test_a_backward_that_cannot_be_compiled_shows_at_the_start(told):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=broken)
    model, plain = model_of(1), model_of(1)
    blocks = arrange(model, compiler=backend)
    assert blocks is not None
    weights = list(model.parameters())
    blocks.warm_up(lambda size: sample(model, nullcontext, 1, *size), [(2, 2), (3, 2)], weights)
    assert not blocks.compiled and len(told()) == 1
    assert all(weight.grad is None for weight in weights)
    assert same(backward(model), backward(plain))


def test_too_many_forms_are_told_and_left(told):
    model, plain = model_of(2), model_of(2)
    blocks = arrange(model, compiler="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in ((2, 3), (4, 5), (5, 2)):
            assert same(backward(model, size), backward(plain, size), 1e-5)
    assert blocks is not None and not blocks.compiled and len(told()) == 1


def test_inductor_gives_the_same(full):
    if not full:
        pytest.skip("minutes of C++ compiler: --full")
    model, plain = model_of(2), model_of(2)
    blocks = arrange(model, (True, False), compiler="inductor")
    for size, tokens in (((2, 3), 8), ((3, 4), 8), ((3, 4), 16), ((2, 3), 16), ((2, 3), 8)):
        assert same(backward(model, size, tokens=tokens), backward(plain, size, tokens=tokens), 1e-5)
    assert blocks is not None and blocks.compiled
