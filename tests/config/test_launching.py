"""Who says how many processes there are: flag, environment, config.json, accelerate's file, the launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sana_tune.config.launching import default_file, file_problems, given_by_variables, is_sharded, split
from sana_tune.config.load import Loaded, load
from sana_tune.errors import UserError
from tests.config.helpers import write_files

FILE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 4, "num_machines": 1}


def accelerate(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**FILE, **changes}))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(place: Path, *, flags: Any = None, environ: Any = None, **settings: Any) -> Loaded:
    return load(write_files(place, settings), flags or {}, {"HF_HOME": str(place / "hf"), **(environ or {})})


def said(loaded: Loaded, key: str = "num_processes") -> tuple[Any, str]:
    return vars(loaded.config.launch)[key], loaded.origins[key]


def test_the_order_of_those_who_say_it(place: Path):
    """Each layer wins over those below it, which are all there."""
    assert said(asked(place)) == (None, "default") and asked(place).config.launch.processes == 1
    accelerate(place / "hf/accelerate/default_config.yaml")
    file = place / "hf/accelerate/default_config.yaml"
    found = asked(place)
    assert said(found) == (4, f"{file}: num_processes")
    assert said(found, "accelerate_config") == (str(file), "accelerate's own file")
    assert f"accelerate's file {file} is used to launch the processes" in found.notes
    assert said(asked(place, num_processes=5))[0] == 5
    environ = {"TRAINING_NUM_PROCESSES": "6"}
    assert said(asked(place, num_processes=5, environ=environ)) == (6, "environment: TRAINING_NUM_PROCESSES")
    environ |= {"ACCELERATE_EXTRA_ARGS": "--num_processes=7 --gpu_ids all"}
    assert said(asked(place, num_processes=5, environ=environ))[0] == 7
    found = asked(place, num_processes=5, environ=environ, flags={"--num_processes": "8"})
    assert said(found) == (8, "command line: --num_processes")
    environ |= {"RANK": "0", "WORLD_SIZE": "9", "LOCAL_RANK": "0"}
    found = asked(place, num_processes=5, environ=environ, flags={"--num_processes": "8"})
    assert said(found) == (9, "environment: WORLD_SIZE")
    assert any("(8) is passed over: the launcher started 9 processes" in note for note in found.notes)


def test_counts_of_nothing_are_nobodys_wish(place: Path):
    assert given_by_variables({"TRAINING_NUM_PROCESSES": "0", "TRAINING_NUM_MACHINES": ""}) == []
    assert said(asked(place, num_processes=2, environ={"TRAINING_NUM_PROCESSES": "0"}))[0] == 2


def test_a_default_file_for_one_process_is_not_looked_at(place: Path):
    accelerate(
        place / "hf/accelerate/default_config.yaml", num_processes=1, distributed_type="NO", mixed_precision="no"
    )
    found = asked(place)
    assert said(found)[0] is None and found.config.model.mixed_precision == "bf16" and found.notes == asked(place).notes
    assert said(asked(place, num_processes=2), "accelerate_config") == (None, "default")


def test_the_file_says_what_nobody_else_did(place: Path):
    file = accelerate(
        place / "mine.yaml", mixed_precision="no", num_machines=2, machine_rank=1, main_process_ip="10.0.0.1",
        main_process_port=29500,
    )  # fmt: skip
    found = asked(place, accelerate_config="mine.yaml")
    assert said(found, "machine_rank")[0] == 1 and said(found, "main_process_ip")[0] == "10.0.0.1"
    assert (
        found.config.model.mixed_precision == "no" and found.origins["mixed_precision"] == "mine.yaml: mixed_precision"
    )
    accelerate(place / "cpu.yaml", use_cpu=True, dynamo_config={"dynamo_backend": "INDUCTOR"})
    found = asked(place, accelerate_config="cpu.yaml")
    assert (found.config.train.device, found.config.model.dynamo_backend) == ("cpu", "inductor")
    environ = {"ACCELERATE_CONFIG_PATH": str(file), "MIXED_PRECISION": "bf16", "TRAINING_MACHINE_RANK": "0"}
    found = asked(place, environ=environ)
    assert said(found, "machine_rank")[0] == 0 and found.origins["mixed_precision"] == "environment: MIXED_PRECISION"
    found = asked(place, num_processes=1, num_machines=1, machine_rank=0, environ={"ACCELERATE_CONFIG_PATH": str(file)})
    assert found.config.launch.processes == 1
    assert any("has no effect: there is one process" in note for note in found.notes)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"distributed_type": "DEEPSPEED"}, ("distributed_type: DeepSpeed cannot be used here", "FSDP2 shards")),
        ({"distributed_type": "MEGATRON_LM"}, ("MEGATRON_LM cannot be used here", "FSDP2")),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, ("must be LOCAL_MACHINE",)),
        ({"distributed_type": "FSDP"}, ("fsdp_version: must be 2; found 1", "to-fsdp2")),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, ("must be 2; found 1",)),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}},
            ("fsdp_reshard_after_forward", "found false", "remove it"),
        ),
    ],
)
def test_what_of_a_file_cannot_be_done_is_told(place: Path, changes: dict[str, Any], told: tuple[str, ...]):
    accelerate(place / "mine.yaml", **changes)
    with pytest.raises(UserError) as error:
        asked(place, accelerate_config="mine.yaml")
    assert all(part in str(error.value) for part in told)


def test_fsdp2_is_seen_wherever_it_is_asked_for(place: Path):
    content = {**FILE, "distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}
    assert file_problems(place, content) == []
    file = accelerate(place / "mine.yaml", **content)
    assert is_sharded(str(file)) and is_sharded(None, split("--use_fsdp --fsdp_version 2")) and not is_sharded(None)


def test_a_process_that_was_started_alone_instead_of_among_others_is_told(place: Path):
    environ = {"MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"}
    with pytest.raises(UserError, match="started this one alone, as it does with --cpu"):
        asked(place, environ=environ)
    with pytest.raises(UserError, match="ACCELERATE_USE_DEEPSPEED: DeepSpeed cannot be used here"):
        asked(place, environ={"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(UserError, match="cannot be split into words"):
        asked(place, accelerate_extra_args="--gpu_ids '0")


def test_where_accelerate_keeps_its_answers():
    assert default_file({"HF_HOME": "/a"}) == Path("/a/accelerate/default_config.yaml")
    assert default_file({"XDG_CACHE_HOME": "/b"}) == Path("/b/huggingface/accelerate/default_config.yaml")
