"""Whole runs that tell others: everything arrives, a resume goes on with it, and failing listeners change nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusers import SanaTransformer2DModel
from safetensors import safe_open

from sana_tune.config.load import Loaded
from sana_tune.run import run
from sana_tune.watch.events import Event
from tests.fake_http import FakeHttp, Moody
from tests.fake_hub import FakeHub, User
from tests.journeys.kit import Child, differences, metrics_of, output_of, pictures, pipeline_of, small_run, state_of
from tests.watch.wandb_files import read_runs

TOKEN, SECRET = "hf_abcdefghijklmnopqrstuvwxyz", "s3cr3t-p4th"
DRAWN: Mapping[str, Any] = {
    "validation_disable": False,
    "validation_prompt": "a red zib",
    "validation_resolution": 32,
    "validation_num_inference_steps": 2,
    "validation_disable_unconditional": True,
    "validation_step_interval": 2,
    "checkpoint_step_interval": 2,
}
KEEP = "import json, sys; print(json.dumps(sys.argv[2:]), file=open(sys.argv[1], 'a'))"


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """What every run of this page needs, loaded once before it forks."""
    import diffusers
    import transformers
    import wandb
    from torch.utils.tensorboard import SummaryWriter

    import sana_tune.model.generate
    import sana_tune.model.sana

    assert diffusers.SanaPipeline and transformers.Gemma2Model and wandb.init and SummaryWriter
    assert sana_tune.model.generate and sana_tune.model.sana


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that takes my uploads, and a machine that is signed in there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub({}, users={TOKEN: User("me")}, root=tmp_path / "hub") as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


@pytest.fixture
def server() -> Iterator[FakeHttp]:
    with FakeHttp({f"/{SECRET}": Moody(b"{}"), f"/500/{SECRET}": 500, f"/hang/{SECRET}": Moody(late_s=60)}) as found:
        yield found


def trained(loaded: Loaded, log: Path, *sinks: Any) -> str:
    """Run it in a fork; what it said."""
    child = Child(lambda: run(loaded, sinks=sinks) and None, log)
    assert child.wait() == 0, child
    return log.read_text()


def said_anywhere(secret: str, output: Path, log: str) -> list[str]:
    """Where a secret stands: the console, or a file of the run, checkpoints left out."""
    files = [path for path in output.rglob("*") if path.is_file() and path.suffix not in (".pt", ".safetensors")]
    return [str(path) for path in files if secret.encode() in path.read_bytes()] + (
        ["console"] if secret in log else []
    )


def test_everything_arrives_and_a_resumed_run_goes_on_with_its_own(hub: FakeHub, server: FakeHttp, tmp_path: Path):
    pictures(tmp_path / "pictures", 4)
    program = tmp_path / "keep.py"
    program.write_text(KEEP)
    keep = f"{sys.executable} {program} {tmp_path}/kept.jsonl"
    settings = {
        **DRAWN,
        "report_to": "wandb,tensorboard",
        "tracker_project_name": "zibs",
        "tracker_run_name": "first zib",
        "webhook_config": {"webhook_type": "raw", "callback_url": f"{server.url}/{SECRET}", "auth_token": SECRET},
        "push_to_hub": True,
        "push_checkpoints_to_hub": True,
        "hub_model_id": "zib",
        "modelspec_comment": "after {current_step} steps",
        "post_checkpoint_script": f"{keep} saved {{global_step}} {{validation_prompt}}",
        "post_upload_script": f"{keep} uploaded {{remote_checkpoint_path}}",
    }
    first = small_run(tmp_path, **settings, max_train_steps=2)
    log = trained(first, tmp_path / "first.log")
    log += trained(small_run(tmp_path, **settings, max_train_steps=4), tmp_path / "second.log")
    output = output_of(first)

    kinds = [post.json() for post in server.posts]
    assert kinds[0]["message"].startswith("Messages of the run first zib")
    statuses = [body["data"]["status"] for body in kinds if body["type"] == "training.status"]
    assert [status for status in statuses if status != "running"] == ["completed", "resumed", "completed"]
    stages = {body["stage"]["key"] for body in kinds if body["type"] == "lifecycle.stage"}
    assert {"benchmark_base_model", "final_validation", "training_complete", "init_resume_checkpoint"} <= stages
    assert sum(len(body.get("images", ())) for body in kinds) == 3, "of the base model, and after steps 2 and 4"
    assert len({body["job_id"] for body in kinds}) == 1 and {post.headers["X-API-Key"] for post in server.posts} == {
        SECRET
    }

    one, two = read_runs(output / "logs")
    assert one.id == two.id == kinds[0]["job_id"] and (one.project, one.name) == ("zibs", "first zib")
    lines = metrics_of(output)
    logged = {line["step"]: line["loss"] for kept in (one, two) for line in kept.history if "loss" in line}
    assert logged == {line["step"]: line["loss"] for line in lines} and len(lines) == 4
    assert list((output / "logs" / "first-zib").glob("events.out.tfevents.*"))

    assert hub.made == {"me/zib": "private"}
    assert [commit.message for commit in hub.commits] == [
        *("Checkpoint of step 2", "Pipeline after 2 steps", "Checkpoint of step 4", "Pipeline after 4 steps"),
    ]
    there = tmp_path / "hub" / "me" / "zib"
    card = (there / "README.md").read_text()
    assert 'from_pretrained("me/zib"' in card and str(tmp_path) not in card
    assert (there / "images" / "step_4_validation_0_32x32.png").is_file() and "a red zib" in card
    for part in ("checkpoint-4/transformer", "transformer"):  # as the cards say it is loaded
        assert SanaTransformer2DModel.from_pretrained(there, subfolder=part).num_parameters() > 0
    assert not list(there.rglob("optimizer*")) and (there / "checkpoint-4" / "progress.json").is_file()
    with safe_open(there / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert weights.metadata()["modelspec.comment"] == "after 4 steps"

    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [words for words in kept if words[0] == "saved"] == [["saved", step, "a red zib"] for step in ("2", "4")]
    assert ["uploaded", f"{hub.url}/me/zib/tree/main/checkpoint-4"] in kept and len(kept) == 6
    assert said_anywhere(SECRET, output, log) == said_anywhere(TOKEN, output, log) == []


class Broken:
    """A listener that fails at everything."""

    def emit(self, event: Event) -> None:
        raise ConnectionError("the server is gone")

    def close(self) -> None:
        raise ConnectionError("the server is gone")


def test_with_every_listener_failing_a_run_ends_with_the_same_weights(hub: FakeHub, server: FakeHttp, tmp_path: Path):
    for name in ("alone", "watched"):
        pictures(tmp_path / name / "pictures", 4)
    alone = small_run(tmp_path / "alone", **DRAWN)
    trained(alone, tmp_path / "alone.log")
    hub.trouble |= {"create": [403] * 9}
    (tmp_path / "a file").write_text("no folder can be made here")
    hooks = [
        {"webhook_type": "raw", "callback_url": f"{server.url}/500/{SECRET}"},
        {"webhook_type": "discord", "webhook_url": f"{server.url}/hang/{SECRET}"},
        {"webhook_type": "discord", "webhook_url": f"http://127.0.0.1:9/{SECRET}"},
    ]
    watched = small_run(
        tmp_path / "watched",
        **DRAWN,
        report_to="wandb,tensorboard",
        logging_dir=str(tmp_path / "a file" / "logs"),
        webhook_config=hooks,
        push_to_hub=True,
        push_checkpoints_to_hub=True,
        post_checkpoint_script=f"{sys.executable} -c 'raise SystemExit(3)'",
        post_upload_script="false",
    )
    log = trained(watched, tmp_path / "watched.log", Broken())
    for words in (
        "wandb failed and is switched off", "tensorboard failed and is switched off", "Broken failed and is switched",
        "was not uploaded: the hub answered 403", "post_checkpoint_script ended with 3; the run goes on",
    ):  # fmt: skip
        assert words in log, log
    one, other = output_of(alone), output_of(watched)
    for step in (2, 4):
        name = f"checkpoint-{step}"
        assert differences(state_of(one / name), state_of(other / name)) == []
    assert pipeline_of(one) == pipeline_of(other) and metrics_of(one) == metrics_of(other)
    assert said_anywhere(SECRET, other, log) == said_anywhere(TOKEN, other, log) == []
