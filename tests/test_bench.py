"""The bench: its cases, the operations that it counts, and that every kind of case runs on nano."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sana_tune.bench import (
    MODELS,
    WARM_UP_STEPS,
    Asked,
    Case,
    Machine,
    Measured,
    cases_of,
    flops_of_picture,
    lines_of,
    measure,
    random_model,
    subject_of,
)
from sana_tune.errors import UserError
from sana_tune.model.facts import KNOWN
from sana_tune.train.ema import Ema
from tests.fixtures import cached_sana


@pytest.mark.parametrize(
    ("model", "side", "teraflops"),
    [("sana-1.6b-1024", 1024, 8.90), ("sana-1.6b-1024", 512, 2.51), ("sana-600m-1024", 1024, 3.36)],
)
def test_the_operations_of_a_picture_are_the_references(model, side, teraflops):
    assert flops_of_picture(subject_of(model), side, 300) / 1e12 == pytest.approx(teraflops, abs=0.005)


def test_fewer_tokens_are_fewer_operations():
    nano = subject_of("nano")
    assert flops_of_picture(nano, 64, 40) < flops_of_picture(nano, 64, 300)


def test_every_name_is_a_published_model_and_a_folder_is_one_too():
    assert set(MODELS.values()) < set(KNOWN) and len(MODELS) == 7
    for name in MODELS:
        subject = subject_of(name)
        assert subject.transformer["num_layers"] == subject.facts.layers
    assert subject_of("terminusresearch/sana-1.6b-1024px").facts.parameters == 1_604_462_752
    folder = subject_of(str(cached_sana()))
    model = random_model(folder.transformer)
    assert sum(parameter.numel() for parameter in model.parameters()) == folder.facts.parameters
    with pytest.raises(UserError, match="no model has the name 'sana-2'; there are nano, sana-600m-512"):
        subject_of("sana-2")


def test_the_cases_are_all_that_is_asked_for_and_possible():
    asked = Asked(
        "nano", (1, 2), ("diffusers", "eager", "compiled"), ("optimi-lion:bf16", "bnb-lion8bit:bf16:release"),
        ("0", "3", "selective"),
    )  # fmt: skip
    cases = cases_of(asked)
    assert len(set(cases)) == len(cases) == 2 * ((3 + 3 + 2) + (2 + 2 + 1)), "no plain release, no compiled selective"
    assert Case("eager", 2, "bnb-lion8bit", True, True, 3) in cases
    one = Case("eager", 1, "optimi-lion", True, False, 1, True)
    assert one in cases and (one.weights, one.recomputed) == ("optimi-lion:bf16", "all, selective")
    words = ("optimi-adamw:bf16:release:clip:ema_cpu", "optimi-lion:ema")
    asked_for = [case.weights for case in cases_of(dataclasses.replace(asked, variants=("eager",), optimizers=words))]
    assert set(asked_for) == set(words), "every word is kept"
    words = {case.recomputed for case in cases}
    assert words == {"none", "1 of 3", "all, selective"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"variants": ("fast",)}, "'fast' is none of diffusers, eager, compiled"),
        ({"optimizers": ("optimi-lion:fp8",)}, "found 'optimi-lion:fp8'"),
        ({"optimizers": ("optimi-lion:ema:ema_cpu",)}, "found 'optimi-lion:ema:ema_cpu'"),
        ({"optimizers": ("optimi-lion:bf16:bf16",)}, "found 'optimi-lion:bf16:bf16'"),
        ({"optimizers": ("optimi-lion:bf16:clip",)}, ":clip belongs to :release"),
        ({"optimizers": ("lion",)}, "sana_tune options optimizer"),
        ({"intervals": ("some",)}, "found 'some'"),
        ({"resolution": 100}, "--resolution"),
        ({"model": "sana-9b"}, "no model has the name"),
        ({"variants": ("compiled",), "intervals": ("selective",)}, "nothing of what is asked for exists"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(changes, told):
    with pytest.raises(UserError, match=told):
        measure(dataclasses.replace(Asked("nano", device="cpu"), **changes))


def test_every_kind_of_case_runs_on_nano():
    asked = Asked(
        "nano", (2,), ("diffusers", "eager"), ("optimi-adamw", "optimi-lion:bf16:release"), ("0", "2", "selective"),
        tokens=9, steps=1, device="cpu",
    )  # fmt: skip
    machine, cases = measure(asked)
    found = list(cases)
    assert machine.precision == "no" and machine.product_tflops > 0
    assert [one.case for one in found] == list(cases_of(asked)) and len(found) == 9
    for one in found:
        assert not one.problem and one.step_s > 0 and one.images_s == pytest.approx(2 / one.step_s)
        assert one.share == pytest.approx(one.tflops / machine.product_tflops)
        assert one.peak_bytes is None, "no GPU was seen, so nothing is said of one"
    values = found[0].to_json()
    assert values["variant"] == "diffusers" and values["images_s"] == found[0].images_s and "case" not in values


def tiny(**changes) -> Asked:
    """What is asked of a model of width 64, one step each on the CPU."""
    asked = Asked(str(cached_sana()), variants=("eager",), intervals=("0",), tokens=9, steps=1, device="cpu")
    return dataclasses.replace(asked, **changes)


def forwards(asked: Asked) -> int:
    """How often the model is computed while one case is measured; that its operations are counted is not computing."""
    found = 0

    def look(module: torch.nn.Module, *_: object) -> None:
        nonlocal found
        if type(module).__name__ == "SanaTransformer2DModel":
            found += not next(module.parameters()).is_meta

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        assert [one.problem for one in measure(asked)[1]] == [""]
    finally:
        handle.remove()
    return found


def test_clipping_of_released_gradients_is_measured_in_its_two_passes():
    once = forwards(tiny(optimizers=("optimi-lion:release",)))
    assert once == WARM_UP_STEPS + 1
    assert forwards(tiny(optimizers=("optimi-lion:release:clip",))) == 2 * once


def test_averages_are_measured_where_they_are_kept(monkeypatch):
    kept = []
    updated = Ema.update
    monkeypatch.setattr(Ema, "update", lambda self, step: (kept.append(self.is_aside), updated(self, step))[0])
    for words, aside in (("", None), (":ema", False), (":ema_cpu", True)):
        kept.clear()
        variants = ("diffusers", "eager") if words == ":ema" else ("eager",)
        found = measure(tiny(variants=variants, optimizers=(f"optimi-adamw{words}",)))[1]
        assert [one.problem for one in found] == [""] * len(variants)
        steps = len(variants) * (WARM_UP_STEPS + 1)
        assert kept == ([] if aside is None else [aside] * steps)


def test_what_could_not_be_compiled_is_not_told_as_compiled(monkeypatch, tmp_path):
    """The blocks go on as they are then: their speed under the name of compiled ones would be a lie."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        eager, compiled = measure(tiny(variants=("eager", "compiled")))[1]
    assert not eager.problem and compiled.problem == "could not be compiled" and compiled.images_s == 0.0


def test_compiled_blocks_are_measured(full):
    if not full:
        pytest.skip("minutes of C++ compiler: --full")
    found = measure(tiny(variants=("compiled",), intervals=("0", "1")))[1]
    assert [(one.problem, one.step_s > 0) for one in found] == [("", True)] * 2


def test_the_table_shows_the_speed_up_over_diffusers_and_what_went_wrong():
    plain, ours = Case("diffusers", 8, "optimi-adamw"), Case("eager", 8, "optimi-adamw")
    found = [
        Measured(
            plain, step_s=0.4, images_s=20, tflops=178, share=0.22, peak_bytes=40 * 10**9, planned_bytes=41 * 10**9
        ),
        Measured(ours, step_s=0.2, images_s=40, tflops=356, share=0.44),
        Measured(dataclasses.replace(ours, batch=32), problem="out of memory"),
    ]
    machine = Machine("a card", "2.13", "bf16", 800)
    first, second, *_, one, two, three = lines_of(Asked("sana-1.6b-1024"), machine, found)
    assert first == (
        "sana-1.6b-1024: 1,604,462,752 parameters, random; 1024x1024 px, 300 text tokens, 8.9 TFLOP a picture"
    )
    assert second == "a card, torch 2.13, computing in bf16; a matrix product reaches 800 TFLOP/s here"
    assert one.split()[-7:] == ["20", "178", "22%", "40.0", "41.0", "1.02", "1.00"], "the plan beside the peak"
    assert found[0].to_json()["memory_ratio"] == pytest.approx(1.025) and found[1].memory_ratio is None
    assert two.split()[-4:] == ["40", "356", "44%", "2.00"]
    assert three.split()[-3:] == ["out", "of", "memory"]
