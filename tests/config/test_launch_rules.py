"""Rules about processes and machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sana_tune.config.launch_rules import LAUNCH_RULES
from sana_tune.config.load import load
from sana_tune.errors import UserError
from tests.config.helpers import write_files

TWO = {"num_machines": 2, "machine_rank": 0, "main_process_ip": "10.0.0.1", "main_process_port": 29500}


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"num_machines": 2, "num_processes": 4}, "missing: machine_rank, main_process_ip, main_process_port"),
        ({**TWO, "num_processes": 4, "machine_rank": 2}, "must be below num_machines 2"),
        ({**TWO, "num_processes": 5}, "which have as many each; found 5"),
        (TWO, "which have as many each; it is not set"),
        ({"num_processes": 2, "optimizer_release_gradients": True}, "needs one process"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, settings: dict[str, Any], told: str):
    with pytest.raises(UserError, match=told):
        load(write_files(tmp_path, settings), {}, {})


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"optimizer": "bnb-adamw8bit"}, "which bnb-adamw8bit cannot work with"),
        ({"weights_dtype": "bf16"}, "FSDP2 is for fp32 weights here"),
        ({"dynamo_backend": "inductor"}, "blocks that FSDP2 splits are not compiled here; found inductor"),
        ({"model_type": "lora", "lora_type": "lycoris"}, "adapters are put on whole ones; found model_type lora"),
        (
            {
                "model_type": "lora",
                "lora_type": "lycoris",
                "base_model_precision": "nf4-bnb",
                "optimizer": "optimi-lion",
            },
            "which optimi-lion cannot work with(.|\n)*model_type: FSDP splits",
        ),
        ({"scheduled_sampling_max_step_offset": 4}, "rollouts.*need the whole model.*found 4"),
        ({}, None),
        ({"num_processes": 1, "optimizer": "bnb-adamw8bit"}, None),
    ],
)
def test_what_cannot_be_split(tmp_path: Path, settings: dict[str, Any], told: str | None):
    content = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_processes": 2}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(content))
    settings = {"accelerate_config": str(tmp_path / "fsdp.yaml"), **settings}
    if told is None:
        assert load(write_files(tmp_path, settings), {}, {}).config.launch.processes in (1, 2)
        return
    with pytest.raises(UserError, match=told):
        load(write_files(tmp_path, settings), {}, {})


def test_one_process_breaks_no_rule(tmp_path: Path):
    config = load(write_files(tmp_path, {"num_machines": 1}), {}, {}).config
    assert len(LAUNCH_RULES) == 8 and [rule(config) for rule in LAUNCH_RULES] == [None] * 8
