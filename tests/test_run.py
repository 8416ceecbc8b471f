"""How the parts are put together: precision, pictures that cannot be encoded, what a run tells and gives back."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sana_tune.config.load import load
from sana_tune.drawing import autocast_dtype, drawing_seed, precision
from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.output import Output
from sana_tune.prepare import prepare, weights_dtype, write_down
from sana_tune.run import release_of, run, without
from sana_tune.watch.events import CacheProgress, Finished, Saved, Started, Stepped, Validated
from tests.config.helpers import write_files
from tests.journeys.kit import Heard, metrics_of, one_thread, pictures, small_run


@pytest.mark.parametrize(
    ("asked", "environ", "wanted", "drawn_in"),
    [
        ({}, {}, "no", None),  # a CPU computes in fp32 unless it is asked to do otherwise
        ({"mixed_precision": "bf16"}, {}, "bf16", torch.bfloat16),
        ({"mixed_precision": "bf16", "weights_dtype": "bf16"}, {}, "bf16", None),
        ({"mixed_precision": "no"}, {"MIXED_PRECISION": "bf16"}, "no", None),
        ({}, {"MIXED_PRECISION": "bf16"}, "bf16", torch.bfloat16),
        ({"mixed_precision": "fp16"}, {}, "fp16", torch.float16),
    ],
)
def test_the_precision_is_what_was_asked_or_what_suits_the_device(asked, environ, wanted, drawn_in, tmp_path):
    loaded = load(write_files(tmp_path, {"device": "cpu", **asked}), {}, environ)
    assert (precision(loaded), autocast_dtype(loaded, weights_dtype(loaded.config))) == (wanted, drawn_in)


def test_several_processes_release_no_gradients(tmp_path):
    """What stands in the way is said, with what was found and what to do."""
    config = load(write_files(tmp_path, {"optimizer_release_gradients": True}), {}, {}).config
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    several: Any = SimpleNamespace(num_processes=2)  # starting two takes half a minute, and this is all that is read
    with pytest.raises(UserError, match=r"needs one process: .*; found 2\n.*train with one process"):
        release_of(config.optimizer, several, layer, optimizer)
    several.num_processes = 1
    assert release_of(config.optimizer, several, layer, optimizer) is not None


@pytest.mark.parametrize(("asked", "seed"), [({}, 0), ({"seed": 5}, 5), ({"seed": 5, "validation_seed": 0}, 0)])
def test_pictures_are_drawn_with_their_own_seed_or_the_runs(asked, seed, tmp_path):
    assert drawing_seed(load(write_files(tmp_path, asked), {}, {}).config) == seed


def test_what_cannot_be_encoded_is_planned_away_and_written_down(tmp_path):
    pictures(tmp_path / "pictures", 3)
    prepared = prepare(small_run(tmp_path), Output.open(tmp_path / "output"))
    write_down(prepared)
    assert prepared.plan.buckets[0].pictures == 3
    left = without(prepared, {"d0/p01.png": "is damaged"})
    assert left.plan.buckets[0].pictures == 2 and [record.key for record in left.survey.records] == [
        "p00.png",
        "p02.png",
    ]
    (entry,) = json.loads((tmp_path / "output/ledger.json").read_text())["datasets"]
    assert (entry["found"], entry["trained"], entry["left_out"]) == (3, 2, [["p01.png", "is damaged"]])
    assert json.loads((tmp_path / "output/plan.json").read_text())["buckets"][0]["pictures"] == 2
    with pytest.raises(UserError, match="not one of 3 pictures"):
        without(prepared, {record.id: "is damaged" for record in prepared.survey.records})


@pytest.fixture
def small(tmp_path: Path) -> Any:
    pictures(tmp_path / "pictures", 3)
    drawing = {"validation_disable": False, "validation_prompt": "a star", "validation_resolution": 32}
    few = {"validation_num_inference_steps": 1, "validation_step_interval": 1, "checkpoint_step_interval": 2}
    return small_run(tmp_path, max_train_steps=3, checkpoint_writing="wait", **drawing, **few)


def test_a_run_tells_its_course_in_order_and_gives_all_back(small, tmp_path):
    """Pictures before, after a step and at the end; checkpoints when due and last; then the pipeline."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    heard = Heard()
    with one_thread():
        progress = run(small, sinks=[heard], notes=["a note of the command line"])
    assert (progress.step, progress.images) == (3, 6)
    kinds = [type(event) for event in heard.events if not isinstance(event, CacheProgress)]
    middle = [Stepped, Validated, Stepped, Saved, Validated, Stepped]
    assert kinds == [Started, Validated, *middle, Saved, Validated, Finished]
    assert heard.encoded == {"text": 5, "latents of d0": 3}  # "", three captions and the prompt
    assert [len(event.files) for event in heard.of(Validated)] == [2, 2, 2, 2]
    assert heard.of(Finished)[0].pipeline == str(tmp_path / "output/pipeline")
    assert [line["step"] for line in metrics_of(tmp_path / "output")] == [1, 2, 3]

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]
    said = (tmp_path / "output/log.txt").read_text(encoding="utf-8")
    assert "a note of the command line" in said and "Model: nano" in said


def run_as(tmp_path, command: str, **environ: str) -> str:
    """A run of two steps on nano from the command line. Answers what it said."""
    small_run(pictures(tmp_path / "pictures", 4).parent, max_train_steps=2)
    ran = subprocess.run(
        [sys.executable, "-m", "sana_tune", "train", "--config", str(tmp_path / "config.json"), *command.split()],
        capture_output=True, text=True, timeout=600, env={**os.environ, **environ},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def test_without_a_compiler_a_compiled_run_says_so_and_trains(tmp_path):
    cache = str(tmp_path / "inductor")
    told = run_as(tmp_path, "--dynamo_backend inductor", CXX="/no/such/compiler", TORCHINDUCTOR_CACHE_DIR=cache)
    assert "Compiling the blocks with inductor" in told
    assert told.count("dynamo_backend: the blocks could not be compiled and run as they are") == 1
    assert [row["skipped"] if "skipped" in row else False for row in metrics_of(tmp_path / "output")] == [False, False]


def test_a_compiled_run_is_that_of_an_uncompiled_one(tmp_path, full):
    if not full:
        pytest.skip("minutes of C++ compiler: --full")
    command = "--gradient_checkpointing true --gradient_checkpointing_interval 2"
    run_as(tmp_path / "plain", command)
    told = run_as(tmp_path / "compiled", f"{command} --dynamo_backend inductor")
    assert "could not be compiled" not in told
    losses = [[row["loss"] for row in metrics_of(tmp_path / kind / "output")] for kind in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({}, []),
        ({"gradient_checkpointing": True}, [0, 1, 2, 3, 4, 5]),
        ({"gradient_checkpointing": True, "gradient_checkpointing_interval": 4}, [0, 4]),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_interval": 2,
                "gradient_checkpointing_segment_stride": 3,
            },
            [0, 1, 3, 4],
        ),
    ],
    ids=["none", "all", "interval", "stride"],
)
@pytest.mark.parametrize("kind", ["torch", "selective"])
def test_blocks_are_recomputed_as_asked_and_train_the_same(settings, again, kind, tmp_path):
    """Norms of nano's blocks that run twice; with `selective`, products that do not; the run is the same to the bit."""
    small_run(pictures(tmp_path / "pictures", 4).parent, max_train_steps=1)
    plain = tmp_path / "plain"
    asked = {**settings, "gradient_checkpointing_backend": kind} if settings else {}
    loaded = [
        load(tmp_path / "config.json", {**values, "output_dir": str(place)}, {})
        for place, values in ((plain, {}), (tmp_path / "asked", asked))
    ]
    seen: dict[str, list[int]] = {"norm1": [], "to_out": []}
    from torch.nn.modules.module import register_module_forward_pre_hook

    def watch(module: Any, inputs: Any) -> None:
        if hasattr(module, "transformer_blocks"):
            for place, block in enumerate(module.transformer_blocks):
                names[id(block.norm1)] = ("norm1", place)
        if id(module) in names:
            name, place = names[id(module)]
            seen[name].append(place)

    names: dict[int, tuple[str, int]] = {}
    with one_thread():
        run(loaded[0])
        handle = register_module_forward_pre_hook(watch)
        try:
            run(loaded[1])
        finally:
            handle.remove()
    assert sorted(seen["norm1"]) == sorted([*range(6), *again])
    one, other = ([row["loss"], row["grad_norm"]] for row in (metrics_of(plain)[0], metrics_of(tmp_path / "asked")[0]))
    assert one == other
