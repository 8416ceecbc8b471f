"""Uploads by the real huggingface_hub client to a hub of our own: what arrives, what fails, what goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.schema import WatchConfig
from sana_tune.errors import UserError
from sana_tune.progress import Progress
from sana_tune.watch.events import Finished, Saved
from sana_tune.watch.hub import HubSink, Repository, find_repository, hub_problems, reason, wants_hub
from sana_tune.watch.uploads import Uploaded
from tests.fake_hub import FakeHub, User

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
NO_WAITS = (0.01, 0.01)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on which the token of this machine belongs to me, who may write for my group too."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub({}, users={TOKEN: User("me", orgs=("group",))}, root=tmp_path / "hub") as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def settings(**more: Any) -> WatchConfig:
    return WatchConfig(**{"push_to_hub": True, "push_checkpoints_to_hub": True, **more})


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    for name, content in {
        "transformer/diffusion_pytorch_model.safetensors": b"weights of %d" % step,
        "transformer/config.json": b"{}",
        "optimizer.pt": b"large",
        "progress.json": b"{}",
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def pipeline(folder: Path) -> Path:
    path = folder / "pipeline"
    for name in ("README.md", "model_index.json", "transformer/model.safetensors"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"final {name}")
    return path


def saved(path: Path, step: int) -> Saved:
    return Saved(Progress(step), str(path), 1.0)


class Run:
    """A sink for a run in tmp_path/run, and what it says was uploaded."""

    def __init__(self, folder: Path, hub: FakeHub, wanted: WatchConfig | None = None, waits_s=NO_WAITS):
        wanted = wanted or settings()
        self.folder, self.done = folder / "run", list[Uploaded]()
        repository = find_repository(wanted, "me/rex", {"HF_ENDPOINT": hub.url})
        card = lambda place, step: f"# card of {place} at {step}"  # noqa: E731
        self.sink = HubSink(self.folder, wanted, repository, card, self.done.append, waits_s)


def test_checkpoints_and_the_pipeline_arrive_in_a_private_repository(hub: FakeHub, tmp_path: Path):
    run = Run(tmp_path, hub)
    run.sink.emit(saved(checkpoint(run.folder, 2), 2))
    run.sink.emit(Finished(Progress(4), str(pipeline(run.folder))))
    run.sink.close()
    assert hub.made == {"me/rex": "private"}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert [commit.paths for commit in hub.commits] == [
        ("README.md", *(f"checkpoint-2/{name}" for name in ("progress.json", "transformer/config.json", weights))),
        ("README.md", "model_index.json", "transformer/model.safetensors"),
    ]
    assert [commit.message for commit in hub.commits] == ["Checkpoint of step 2", "Pipeline after 4 steps"]
    there = tmp_path / "hub" / "me" / "rex"
    assert (there / "checkpoint-2" / weights).read_bytes() == b"weights of 2"
    assert (there / "README.md").read_text() == "final README.md"
    assert [(upload.step, upload.url) for upload in run.done] == [
        (2, f"{hub.url}/me/rex/tree/main/checkpoint-2"),
        (4, f"{hub.url}/me/rex"),
    ]
    assert not list(run.folder.glob(".upload-*"))


def test_the_optimizer_goes_along_when_asked_for_and_a_repository_can_be_public(hub: FakeHub, tmp_path: Path):
    run = Run(tmp_path, hub, settings(push_optimizer_to_hub=True, model_card_private=False))
    run.sink.emit(saved(checkpoint(run.folder, 2), 2))
    run.sink.close()
    assert "checkpoint-2/optimizer.pt" in hub.commits[0].paths and hub.made == {"me/rex": "public"}
    assert (tmp_path / "hub/me/rex/README.md").read_text() == "# card of checkpoint-2 at 2"


def test_only_what_is_asked_for_is_uploaded(hub: FakeHub, tmp_path: Path):
    run = Run(tmp_path, hub, settings(push_checkpoints_to_hub=False))
    run.sink.emit(saved(checkpoint(run.folder, 2), 2))
    run.sink.close()
    assert hub.commits == []
    run = Run(tmp_path, hub, settings(push_to_hub=False))
    run.sink.emit(Finished(Progress(4), str(pipeline(run.folder))))
    run.sink.close()
    assert hub.commits == [] and not wants_hub(WatchConfig())


def test_a_checkpoint_that_is_pruned_meanwhile_arrives_whole(hub: FakeHub, tmp_path: Path):
    run = Run(tmp_path, hub)
    path = checkpoint(run.folder, 2)
    hub.trouble["create"] = [500]
    begin = time.perf_counter()
    run.sink.emit(saved(path, 2))
    assert time.perf_counter() - begin < 5, "the run does not wait"
    for file in path.rglob("*.*"):
        file.unlink()
    run.sink.close()
    assert len(hub.commits) == 1 and len(hub.commits[0].paths) == 4


def test_what_was_sent_before_a_failure_is_not_sent_again(hub: FakeHub, tmp_path: Path, caplog):
    caplog.set_level("INFO", "sana_tune")
    hub.trouble["commit"] = [500, 500]
    run = Run(tmp_path, hub)
    run.sink.emit(saved(checkpoint(run.folder, 2), 2))
    run.sink.close()
    assert len(hub.commits) == 1 and len(hub.puts) == 1, "the weights once, though it took three commits"
    tried = [record.message for record in caplog.records if "tried again" in record.message]
    assert len(tried) == 2 and "the hub answered 500" in tried[0]


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"commit": [403]}, "the hub answered 403: the token may not write there"),
        ({"create": [500, 500, 500]}, "the hub answered 500"),
        ({"put": [403]}, "the hub answered 403"),
    ],
)
def test_an_upload_that_fails_stops_nothing_and_is_told_at_the_end(
    hub: FakeHub, tmp_path: Path, caplog, trouble: dict, words: str
):
    hub.trouble |= trouble
    run = Run(tmp_path, hub)
    path = checkpoint(run.folder, 2)
    run.sink.emit(saved(path, 2))
    run.sink.emit(saved(checkpoint(run.folder, 4), 4))
    run.sink.close()
    last = caplog.records[-1].message
    assert last.startswith("checkpoint-2 was not uploaded: ") and words in last
    assert last.endswith(f"by hand: hf upload me/rex {path} checkpoint-2")
    assert [commit.message for commit in hub.commits] == ["Checkpoint of step 4"]
    assert [upload.step for upload in run.done] == [4]
    assert TOKEN not in caplog.text


def test_without_the_background_the_run_waits(hub: FakeHub, tmp_path: Path):
    run = Run(tmp_path, hub, settings(push_to_hub_background=False))
    run.sink.emit(saved(checkpoint(run.folder, 2), 2))
    assert len(hub.commits) == 1
    run.sink.close()


def test_a_hub_that_is_gone_in_the_end(hub: FakeHub, tmp_path: Path, caplog):
    away = Repository("me/rex", True, "http://127.0.0.1:9")
    sink = HubSink(tmp_path, settings(), away, lambda place, step: "", waits_s=NO_WAITS)
    sink.emit(Finished(Progress(4), str(pipeline(tmp_path))))
    sink.close()
    assert caplog.records[-1].message.startswith("the pipeline was not uploaded: ConnectError")


def test_what_a_killed_run_left_is_removed(hub: FakeHub, tmp_path: Path):
    (tmp_path / "run" / ".upload-checkpoint-2").mkdir(parents=True)
    Run(tmp_path, hub).sink.close()
    assert not list((tmp_path / "run").glob(".upload-*"))


def test_too_many_that_wait_are_told(hub: FakeHub, tmp_path: Path, caplog):
    hub.trouble["create"] = [500]
    run = Run(tmp_path, hub, waits_s=(1.5,))
    for step in range(1, 7):
        run.sink.emit(saved(checkpoint(run.folder, step), step))
    run.sink.close()
    lost = [record for record in caplog.records if "earlier uploads had not ended" in record.message]
    assert len(hub.commits) + len(lost) == 6 and lost


# ---- before the run ----


def test_the_repository_belongs_to_whom_the_token_does(hub: FakeHub):
    environ = {"HF_ENDPOINT": hub.url}
    assert find_repository(settings(), "rex", environ) == Repository("me/rex", True, hub.url)
    assert find_repository(settings(), "group/rex", environ).id == "group/rex"
    assert hub.requests[-1].path == "/api/whoami-v2" and hub.made == {}


@pytest.mark.parametrize(
    ("user", "name", "words"),
    [
        (User("me"), "someone/rex", "me may not write for someone; it may for me"),
        (User("me", role="read"), "rex", "the token of me may only read"),
        (None, "rex", "the hub refuses the token of this machine"),
    ],
)
def test_a_token_that_will_not_do_is_told_before_the_run(hub: FakeHub, user: User | None, name: str, words: str):
    hub.users = {TOKEN: user} if user else {}
    with pytest.raises(UserError, match=words) as told:
        find_repository(settings(), name, {"HF_ENDPOINT": hub.url})
    assert TOKEN not in str(told.value)


def test_a_hub_that_cannot_be_asked_is_told(hub: FakeHub):
    hub.trouble["whoami"] = [503]
    with pytest.raises(UserError, match=r"whether uploads may go there \(the hub answered 503\)"):
        find_repository(settings(), "rex", {"HF_ENDPOINT": hub.url})
    with pytest.raises(UserError, match="cannot be asked"):
        find_repository(settings(), "rex", {"HF_ENDPOINT": "http://127.0.0.1:9"})


def test_what_this_machine_knows_is_told_without_the_network(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    assert "offline mode is on" in hub_problems(settings())[0].what
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "has none" in hub_problems(settings())[0].what
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub_problems(settings()) == hub_problems(WatchConfig()) == []


def test_no_token_stands_in_a_reason():
    assert TOKEN not in reason(ValueError(f"cannot send {TOKEN} there"))
    assert os.environ.get("HF_TOKEN") is None
