"""Several processes train what one would: on the CPU, over gloo, with the nano model.

The processes are forks that believe a launcher has started them, but for one test of `sana_tune train` as users start
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune import prepare
from sana_tune import run as runs
from sana_tune.config.load import Loaded, load
from sana_tune.data import loader
from sana_tune.data.cache import TensorCache
from sana_tune.errors import Interrupted, UserError
from sana_tune.train import folders
from sana_tune.train.crew import LostRank
from sana_tune.train.pulse import Place
from tests.journeys.kit import (
    Child,
    all_well,
    bytes_of,
    metrics_of,
    output_of,
    pictures,
    ranks,
    small_run,
    state_of,
)
from tests.journeys.test_kills import killed_at, killed_during

KILLS, KILLS_IN_FULL = 5, 20
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as accelerate's launcher says it
MOST = 1e-6  # between weights in fp32


def told(loaded: Loaded, rank: int = 0, spoil: Callable[[int, int], bool] = lambda rank, step: False) -> int:
    """A run that writes down, beside its output, what this process was given at each step and its weights at the end.

    spoil: (rank, step) → whether the latents of that step are NaN here. Answers the exit code.
    """
    given: list[Any] = []

    class Told(loader.Batches):
        def load(self, step: int) -> loader.Step:
            loaded = super().load(step)
            given.append([step, [[micro.index, batch.ids] for micro, batch in loaded]])
            if spoil(rank, step):
                return [(micro, replace(batch, latents=batch.latents * float("nan"))) for micro, batch in loaded]
            return loaded

    built: list[Any] = []
    build = runs.build_parts
    runs.build_parts = lambda *asked: built.append(build(*asked)) or built[0]  # type: ignore[assignment]
    loader.Batches = Told
    try:
        runs.run(loaded)
    except Interrupted as error:
        return error.exit_code
    except UserError as error:
        print(error)
        return 2 if isinstance(error, LostRank) else 1
    weights = b"".join(bytes_of(runs_local(each)) for each in built[0].bare.state_dict().values())
    content = {"given": given, "weights": hashlib.sha256(weights).hexdigest()}
    output_of(loaded).with_name(f"{output_of(loaded).name}-told-{rank}.json").write_text(json.dumps(content))
    return 0


def runs_local(tensor: torch.Tensor) -> torch.Tensor:
    from sana_tune.train.sharding import local

    return local(tensor)


def together(count: int, path: Path, spoil: Any = None, **environ: str) -> list[Child]:
    """The run of a config file in so many processes."""
    extra = {} if spoil is None else {"spoil": spoil}
    return ranks(count, lambda rank: told(load(path, {}), rank, **extra), path.parent, **environ)


def alone(path: Path) -> None:
    all_well([Child(lambda: told(load(path, {}, {})), path.parent / "alone.txt")])


def told_by(path: Path, count: int) -> list[dict[str, Any]]:
    """What each process of a run wrote down."""
    return [json.loads((path.parent / f"output-told-{rank}.json").read_text()) for rank in range(count)]


def order_of(path: Path, count: int) -> list[list[Any]]:
    """The ids of each micro-batch of a run, by the run's count, with all processes' together; none stands twice."""
    found = sorted(micro for part in told_by(path, count) for _, step in part["given"] for micro in step)
    assert len({index for index, _ in found}) == len(found)
    return found


def worst(one: Path, other: Path) -> float:
    """The largest difference between the tensors of two checkpoints; all else is the same."""
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    plain = {name for name, value in first.items() if not isinstance(value, torch.Tensor)}
    assert {name: first[name] for name in plain} == {name: second[name] for name in plain}
    return max(float((first[name] - second[name]).abs().max()) for name in first.keys() - plain if first[name].numel())


def new_run(folder: Path, *datasets: dict[str, Any], **settings: Any) -> Path:
    """Seven pictures of two sizes and EMA; answers the config's path. datasets: further ones.

    Adam divides a gradient by its own size, be it rounding alone, of which processors do not make the same: with a
    large epsilon what is next to nothing moves next to nothing.
    """
    if not (folder.parent / "pictures").exists():
        pictures(folder.parent / "pictures", 5)
        pictures(folder.parent / "pictures", 2, (64, 32), name="wide")
    shown = {"instance_data_dir": str(folder.parent / "pictures")}
    text = {"dataset_type": "text_embeds", "write_batch_size": 1}
    small_run(folder, shown, *datasets, text, write_batch_size=1, use_ema=True, optimizer_epsilon=1e-3, **settings)
    return folder / "config.json"


DRAWN = {
    "validation_disable": False, "validation_prompt": "a red circle", "validation_resolution": "32,64",
    "validation_num_inference_steps": 1, "num_validation_images": 2, "disable_benchmark": True,
}  # fmt: skip


def test_two_processes_train_what_one_does_with_accumulation_two(tmp_path: Path):
    """Weights, average, optimizer, numbers and pictures; each picture encoded once, and shown once an epoch."""
    one = new_run(tmp_path / "one", gradient_accumulation_steps=2, gradient_checkpointing=True, **DRAWN)
    two = new_run(tmp_path / "two", gradient_checkpointing=True, **DRAWN)
    alone(one)
    all_well(together(2, two))
    output = two.parent / "output"
    assert worst(one.parent / "output/checkpoint-4", output / "checkpoint-4") <= MOST
    first, second = metrics_of(one.parent / "output"), metrics_of(output)
    assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], abs=MOST)
    assert [line["grad_norm"] for line in first] == pytest.approx([line["grad_norm"] for line in second], rel=1e-5)

    order = order_of(two, 2)
    assert order == order_of(one, 1)
    seen = Counter(name for _, ids in order[:4] for name in ids)
    assert len(seen) == 7 and sum(seen.values()) == 8, "an epoch is 4 micro-batches of 2: one picture is filled in"
    drawn = sorted(path.name for path in (output / "validation_images").iterdir())
    assert drawn == sorted(path.name for path in (one.parent / "output/validation_images").iterdir())
    assert len(drawn) == 4 * 2 * 2 + 1 and json.loads((output / "plan.json").read_text())["ranks"] == 2

    for cache in ("text", "vae/d0"):
        index = TensorCache(output / "cache" / cache).index
        assert len(index) == len(index.files) == len(TensorCache(one.parent / "output/cache" / cache).index)
    assert (output / "log-rank1.txt").exists() and (output / "pipeline/transformer_ema").is_dir()
    said = (two.parent / "rank-1.txt").read_text()
    assert said == "", "others than the first say nothing"


def test_a_run_of_two_goes_on_as_one_and_as_four(tmp_path: Path):
    """With the order that one process would have, and a step of as many pictures."""
    whole = new_run(tmp_path / "whole", gradient_accumulation_steps=4, max_train_steps=4)
    half = new_run(tmp_path / "half", gradient_accumulation_steps=2, max_train_steps=2)
    alone(whole)
    all_well(together(2, half))
    ends = {}
    for count in (1, 4):
        folder = tmp_path / f"on {count}"
        shutil.copytree(half.parent, folder)
        content = json.loads((folder / "config.json").read_text())
        content |= {"output_dir": str(folder / "output"), "max_train_steps": 4}
        (folder / "config.json").write_text(json.dumps(content))
        all_well(together(count, folder / "config.json"))
        ends[count] = order_of(folder / "config.json", count)
        assert worst(whole.parent / "output/checkpoint-4", folder / "output/checkpoint-4") <= MOST
        said = (folder / "output/log.txt").read_text()
        assert f"gradient_accumulation_steps is {4 // count} instead of 2: a step stays 4 micro-batches" in said
    assert ends[1] == ends[4] == order_of(whole, 1)[8:]
    child = together(3, half)[0]
    assert child.wait() == 1 and "4 micro-batches a step, which 3 processes cannot share evenly" in repr(child)


def test_a_bad_number_on_one_process_is_skipped_by_all(tmp_path: Path):
    path = new_run(tmp_path / "run")
    all_well(together(2, path, spoil=lambda rank, step: rank == 1 and step == 1))
    first, second = told_by(path, 2)
    assert first["weights"] == second["weights"]
    lines = metrics_of(path.parent / "output")
    assert [line["step"] for line in lines if line["loss"] is None or line["loss"] != line["loss"]] == [2]
    assert (path.parent / "output/checkpoint-4").is_dir()


KINDS = pytest.mark.parametrize("environ", [{}, FSDP2], ids=["ddp", "fsdp2"])


def test_one_process_decides_whether_training_waits_for_a_checkpoint(tmp_path: Path):
    """Each sees another free memory, and to wait is to agree: they would talk past each other."""
    settings = {"checkpoint_step_interval": 1}
    same, other = new_run(tmp_path / "same", **settings), new_run(tmp_path / "other", **settings)
    all_well(together(2, same))

    def life(rank: int) -> int:
        prepare.free_ram_bytes = lambda: 0 if rank else 10**12  # type: ignore[assignment]
        return told(load(other, {}), rank)

    all_well(ranks(2, life, other.parent))
    assert worst(same.parent / "output/checkpoint-4", other.parent / "output/checkpoint-4") == 0.0
    assert json.loads((other.parent / "output/plan.json").read_text())["saving"]["background"]


@KINDS
def test_held_out_pictures_are_measured_together_as_by_one(tmp_path: Path, environ: Any):
    """Each process measures a share of them; what is told is of all, and the best checkpoint the same."""
    pictures(tmp_path / "held", 5, seed=3, name="h")
    held = {"id": "held", "dataset_type": "eval", "instance_data_dir": str(tmp_path / "held")}
    settings = {"eval_steps_interval": 2, "eval_timesteps": 3}
    one = new_run(tmp_path / "one", held, gradient_accumulation_steps=2, **settings)
    two = new_run(tmp_path / "two", held, **settings)
    alone(one)
    all_well(together(2, two, **environ))

    def measured(path: Path) -> list[Any]:
        lines = [json.loads(line) for line in (path.parent / "output/events.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == "measured"]

    first, second = measured(one), measured(two)
    assert [line["step"] for line in first] == [line["step"] for line in second] == [0, 2, 4]
    for expected, found in zip(first, second, strict=True):
        assert found["values"] == pytest.approx(expected["values"], rel=1e-3, abs=1e-5)
        assert found["values"]["held_out/raw/loss"] == pytest.approx(expected["values"]["held_out/raw/loss"], rel=1e-6)


@KINDS
@pytest.mark.parametrize("harm", ["latent", "weight"])
def test_where_one_process_has_too_many_bad_numbers_all_end_and_it_is_named(tmp_path: Path, environ: Any, harm: str):
    """They go through the same passes to find it: nobody waits for one that has left."""
    path = new_run(tmp_path / "run", max_bad_steps=2)

    def poisoned(asked: Any, *more: Any) -> Any:
        parts = build(asked, *more)
        with torch.no_grad():
            runs_local(parts.bare.transformer_blocks[1].ff.conv_point.weight).view(-1)[0] = float("nan")
        return parts

    build = runs.build_parts

    def life(rank: int) -> int:
        if rank == 1 and harm == "weight":  # after the processes were made equal
            runs.build_parts = poisoned
        return told(load(path, {}), rank, lambda rank, step: harm == "latent" and rank == 1 and step > 0)

    children = ranks(2, life, path.parent, **environ)
    assert [child.wait(60) for child in children] == [1, 1], children
    found = json.loads((path.parent / "output/diagnosis.json").read_text())
    said = repr(children[0])
    assert found["rank"] == 1 and f"{found['what']}" in said.replace("The ", "the ")
    if harm == "latent":
        assert found["step"] == 3 and found["finding"]["stage"] == "inputs"
        assert any(
            f"the latent of {sample['id']}, as its cache holds it" in found["what"] for sample in found["samples"]
        )
        (line,) = (line for line in said.splitlines() if "step 2 was skipped: its loss is not finite" in line)
        assert len(line.partition("its pictures: ")[2].split(", ")) == 2 * 2, "those of both processes"
    else:
        assert found["step"] == 2 and found["finding"]["stage"] == "weights"
        assert "transformer_blocks.1.ff.conv_point.weight" in found["what"]


@pytest.mark.parametrize(
    ("environ", "room"), [({}, True), (FSDP2, True), (FSDP2, False)], ids=["ddp", "fsdp2", "fsdp2, no memory"]
)
def test_a_bad_output_of_one_process_is_repeated_in_fp32_by_all(tmp_path: Path, environ: Any, room: bool):
    """Where the model is split no process has a pass of its own: one that lacks the memory for it ends with what it
    knows, and the other with it."""
    path = new_run(tmp_path / "run", max_bad_steps=1, mixed_precision="bf16")
    build = runs.build_parts

    def bad(*asked: Any) -> Any:
        parts = build(*asked)
        query = parts.bare.transformer_blocks[1].attn2.to_q
        inner = query.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not (room or torch.is_grad_enabled()):
                raise torch.OutOfMemoryError
            return inner(x) * float("nan")

        query.forward = forward
        return parts

    def life(rank: int) -> int:
        if rank == 1:
            runs.build_parts = bad
        return told(load(path, {}), rank)

    children = ranks(2, life, path.parent, **environ)
    assert [child.wait(60) for child in children] == [1 if room else 2, 1], children
    found = json.loads((path.parent / "output/diagnosis.json").read_text())
    exact = "not finite" if room else "memory"
    named = {"stage": "forward", "place": "transformer_blocks.1.attn2.to_q (Linear)", "exact": exact}
    assert found["rank"] == 1 and found["finding"] == named
    assert found["what"] in repr(children[1]).replace("The ", "the ")
    if room:
        assert found["what"] in repr(children[0]).replace("The ", "the ")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path):
    path = new_run(tmp_path / "run", max_train_steps=100_000)
    children = together(2, path)
    children[0].until(lambda: "step 1 of" in repr(children[0]))
    children[1].send(signal.SIGINT)
    assert [child.wait() for child in children] == [128 + signal.SIGINT] * 2
    (saved,) = folders.list_complete(path.parent / "output")
    assert saved.step == metrics_of(path.parent / "output")[-1]["step"]


def test_split_by_fsdp2_they_train_the_same_and_go_on_whole(tmp_path: Path):
    """Every tensor lies in two halves; what is saved, drawn and exported is whole, and loads anywhere."""
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "num_validation_images": 1}
    one = new_run(tmp_path / "one", **{**DRAWN, **options})
    two = new_run(tmp_path / "two", **{**DRAWN, **options, "gradient_accumulation_steps": 1}, max_train_steps=2)
    alone(one)
    all_well(together(2, two, **FSDP2))
    first, second = told_by(two, 2)
    assert first["weights"] != second["weights"], "each holds its half"
    content = json.loads(two.read_text())
    two.write_text(json.dumps({**content, "max_train_steps": 3}))
    all_well(together(2, two, **FSDP2))
    two.write_text(json.dumps({**content, "max_train_steps": 4}))
    all_well(together(1, two))
    output = two.parent / "output"
    assert worst(one.parent / "output/checkpoint-4", output / "checkpoint-4") <= MOST
    names = [path.name for path in (output / "validation_images").iterdir()]
    assert Counter(name.split("_")[1] for name in names) == {"2": 9, "3": 9, "4": 9}, "two prompts, and the sheet"


# ---- killed ----


@pytest.mark.timeout(1800)
def test_one_process_is_killed_at_any_moment_and_the_run_goes_on(tmp_path: Path, full: bool):
    """The other one ends within seconds and says why; what is there is whole, and the end is as if nothing had been."""
    settings = {"checkpoint_step_interval": 1, "checkpoints_total_limit": 2, "max_train_steps": 6}
    undisturbed = new_run(tmp_path / "undisturbed", **settings)
    all_well(together(2, undisturbed))
    path, luck, kills = new_run(tmp_path / "run", **settings), random.Random(7), Counter[str]()
    wanted = KILLS_IN_FULL if full else KILLS
    for number in range(2 * wanted):  # some come to their end before
        if kills.total() == wanted:
            break
        victim = number % 2
        aims = (partial(killed_at, "checkpoint", luck.randint(1, 30)), partial(killed_during, "checkpoint", 1, 0.5))
        aim = aims[number // 2 % 2] if victim == 0 else None

        def life(rank: int, victim: int = victim, aim: Callable[[], None] | None = aim) -> int:
            if rank == victim and aim is not None:
                aim()
            return told(load(path, {}), rank)

        children = ranks(2, life, path.parent)
        if aim is None:
            begun = partial(has_begun, children[0])
            children[1].until(begun)
            time.sleep(luck.uniform(0, 0.5))
            children[1].send(signal.SIGKILL)
        code, began_s = children[victim].wait(), time.monotonic()
        other = children[1 - victim].wait()
        assert time.monotonic() - began_s < 15
        if code == 0:  # it had ended before
            shutil.rmtree(path.parent / "output")
            continue
        assert code == -signal.SIGKILL and other == 2, repr(children[1 - victim])
        assert "the connection to another process of the run is lost" in repr(children[1 - victim])
        inside = any(each.name.startswith(".checkpoint-") for each in (path.parent / "output").iterdir())
        kills["inside a write" if inside else "elsewhere"] += 1
        for each in (path.parent / "output").glob("checkpoint-*"):
            found = folders.read(each)
            assert found is not None and folders.damage(found) == []
        for child in children:
            child.log.unlink()
    all_well(together(2, path))
    assert worst(undisturbed.parent / "output/checkpoint-6", path.parent / "output/checkpoint-6") == 0.0, "to the bit"
    print(f"kills: {dict(kills)}")
    assert kills["inside a write"] and kills.total() == wanted


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["prepare", "open_caches", "encode_pictures"])
def test_one_process_is_killed_before_training_begins(tmp_path: Path, moment: str, victim: int):
    """The other one waits for it outside of any collective operation, and is told all the same."""
    path = new_run(tmp_path / "run")

    def life(rank: int) -> int:
        if rank == victim:
            setattr(runs, moment, lambda *arguments, **words: os.kill(os.getpid(), signal.SIGKILL))
        return told(load(path, {}), rank)

    children = ranks(2, life, path.parent)
    assert children[victim].wait() == -signal.SIGKILL
    began_s = time.monotonic()
    assert children[1 - victim].wait() == 2, repr(children[1 - victim])
    assert time.monotonic() - began_s < 15
    said = repr(children[1 - victim])
    assert "the connection to another process of the run is lost" in said and "Traceback" not in said


def test_one_process_is_killed_while_they_meet(tmp_path: Path):
    """It held the store that the other is about to write to."""
    path = new_run(tmp_path / "run")
    victim = tmp_path / "victim"

    def life(rank: int) -> int:
        if rank == 0:
            victim.write_text(str(os.getpid()))

        def connected(asked: Any) -> Any:
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            while replace(Place.own(), pid=int(victim.read_text())).lives:
                time.sleep(0.01)
            return connect(asked)

        connect = runs.Crew.connected
        runs.Crew.connected = connected  # type: ignore[method-assign,assignment]
        return told(load(path, {}), rank)

    children = ranks(2, life, path.parent)
    assert [child.wait() for child in children] == [-signal.SIGKILL, 2], children
    said = repr(children[1])
    assert "the connection to another process of the run is lost" in said and "Traceback" not in said


def has_begun(child: Child) -> bool:
    return "step " in repr(child) or not child.running


def test_mistakes_are_told_once_before_anything_is_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from sana_tune.cli.main import exit_code

    path = new_run(tmp_path / "run", num_processes=2)

    def said(*words: str) -> str:
        assert exit_code(["train", "--config", str(path), *words]) == 1
        told = capsys.readouterr()
        assert "Launching" not in told.out and "Traceback" not in told.err
        return told.err

    assert said("--validation_resolution", "33", "--validation_disable", "false").count("error: ") == 1
    assert "DeepSpeed cannot be used here" in said("--accelerate_extra_args=--use_deepspeed")
    assert "the run is to have 2 processes; found 1" in said_by_run(path)


def said_by_run(path: Path) -> str:
    with pytest.raises(UserError) as error:
        runs.run(load(path, {}))
    return str(error.value)


def test_words_that_accelerate_does_not_know_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from sana_tune.cli.main import exit_code

    path = new_run(tmp_path / "run", num_processes=2)
    words: Sequence[str] = ("train", "--config", str(path), "--accelerate_extra_args=--rdzv_backend")
    assert exit_code(list(words)) == 1
    assert "accelerate says: argument --rdzv_backend" in capsys.readouterr().err


# ---- adapters ----


def test_two_processes_train_an_adapter_as_one_does(tmp_path: Path):
    (tmp_path / "lycoris.json").write_text('{"algo": "lokr", "full_matrix": true, "factor": 4}')
    adapter = {"model_type": "lora", "lycoris_config": str(tmp_path / "lycoris.json")}
    one = new_run(tmp_path / "one", gradient_accumulation_steps=2, **adapter)
    two = new_run(tmp_path / "two", **adapter)
    alone(one)
    all_well(together(2, two))
    assert worst(one.parent / "output/checkpoint-4", two.parent / "output/checkpoint-4") <= MOST
    first, second = told_by(two, 2)
    assert first["weights"] == second["weights"]
