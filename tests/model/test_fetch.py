"""Finding a model: built in, in a folder, and with the real huggingface_hub client on a hub of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sana_tune.errors import UserError
from sana_tune.model.fetch import (
    is_offline,
    likely_meant,
    local_folder,
    locate,
    needed_files,
    on_disk,
    plan_download,
)
from sana_tune.model.layout import COMPONENTS, list_files
from tests.fake_hub import FakeHub

NAME = "someone/tiny_sana_diffusers"
CALLS = """
import json, logging, os, sys
from sana_tune.errors import UserError
from sana_tune.model import fetch
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
logging.getLogger("httpx").setLevel("WARNING")
answers = []
for what, name, token, options in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        answers.append({"answer": str(getattr(fetch, what)(name, **options))})
    except UserError as error:
        answers.append({"problem": str(error)})
assert "torch" not in sys.modules
print(json.dumps(answers))
"""


def call(name: str = NAME, *, what: str = "locate", token: str = "", **options) -> tuple:
    """One call of a function of fetch by the real client, signed in with a token or not."""
    return what, name, token, options


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A model as the hub stores it: bf16 variants beside the plain files, and files that nobody needs."""
    folder = tmp_path_factory.mktemp("repository") / "model"
    nano = local_folder("nano")
    assert nano is not None
    shutil.copytree(nano, folder)
    for component, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shutil.copy(folder / component / f"{stem}.safetensors", folder / component / f"{stem}.bf16.safetensors")
    for name in ("README.md", "asset/picture.png", "transformer/notes.md", "transformer/old.ckpt", "vae/old.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


class Client:
    """The real client in a process of its own, with its own cache, pointed at a hub by the environment."""

    def __init__(self, home: Path):
        self.home = home

    def start(self, hub_url: str, *calls: tuple, offline: bool = False) -> subprocess.Popen:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        }
        return subprocess.Popen(
            [sys.executable, "-c", CALLS, json.dumps(calls or [call()])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask_all(self, hub_url: str, *calls: tuple, offline: bool = False) -> list[_Answer]:
        with self.start(hub_url, *calls, offline=offline) as child:
            out, err = child.communicate(timeout=200)
        assert child.returncode == 0, err
        return [_Answer(answer, log=err) for answer in json.loads(out)]

    def ask(self, hub_url: str, *calls: tuple, offline: bool = False) -> _Answer:
        return self.ask_all(hub_url, *calls, offline=offline)[0]


class _Answer(dict):
    """The child's answer; what it lacks is told with all that it said."""

    def __missing__(self, key: str) -> str:
        raise AssertionError(f"no {key!r}: {dict(self)}")


@pytest.fixture
def client(tmp_path) -> Client:
    return Client(tmp_path / "huggingface")


def test_nano_is_built_in():
    folder = locate("nano")
    assert (folder / "model_index.json").is_file() and plan_download("nano") == 0


def test_a_folder_is_used_where_it_is(tmp_path):
    shutil.copytree(locate("nano"), tmp_path / "my model")
    assert locate(str(tmp_path / "my model")) == tmp_path / "my model"
    with pytest.raises(UserError, match="a revision belongs to a hub id"):
        locate(str(tmp_path / "my model"), revision="main")


@pytest.mark.parametrize("name", ["./models/sana", "models/sana/v1", "nanno", "/no/such/folder", "C:\\models\\sana"])
def test_a_path_that_is_not_there_says_so(name):
    with pytest.raises(UserError, match="there is no folder") as caught:
        locate(name)
    assert name in str(caught.value) and str(Path.cwd()) in str(caught.value)
    if name == "nanno":
        assert "did you mean nano" in str(caught.value)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "sana.safetensors").touch()
    with pytest.raises(UserError, match="is a file"):
        locate(str(tmp_path / "sana.safetensors"))


def test_only_needed_files_in_one_variant_are_downloaded(repository, client):
    plan = call(what="plan_download")
    with FakeHub({NAME: repository}) as hub:
        planned = client.ask(hub.url, plan)
        assert not hub.downloaded(), "planning downloads nothing"
        found = client.ask(hub.url)
        folder = Path(found["answer"])
        wanted = set(needed_files(_repo_files(repository), NAME))
        assert hub.downloaded() == wanted == set(list_files(folder))
        assert "transformer/diffusion_pytorch_model.safetensors" in wanted
        assert "text_encoder/model.bf16.safetensors" in wanted, "the text encoder runs in bf16"
        assert "text_encoder/model.safetensors" not in wanted
        for file in wanted:
            assert (folder / file).read_bytes() == (repository / file).read_bytes()
        size = sum((repository / file).stat().st_size for file in wanted)
        assert planned["answer"] == str(size) and f"{size / 1e9:.2f} GB" in found["log"]

        before = dict(hub.sent)
        again, planned = client.ask_all(hub.url, call(), plan)
        assert again["answer"] == found["answer"] and hub.sent == before, "the second run downloads nothing"
        assert planned["answer"] == "0"
    # without the hub: the copy is used, loudly when it was not asked to be offline
    assert client.ask(hub.url, offline=True)["answer"] == found["answer"]
    unreachable = client.ask(hub.url)
    assert unreachable["answer"] == found["answer"] and "going on with the copy" in unreachable["log"]


def test_the_variant_follows_the_precision_or_the_wish(repository, client):
    names = _repo_files(repository)
    bf16 = needed_files(names, NAME, dtype="bf16")
    assert "transformer/diffusion_pytorch_model.bf16.safetensors" in bf16
    assert "transformer/diffusion_pytorch_model.safetensors" not in bf16
    assert "vae/diffusion_pytorch_model.safetensors" in bf16, "there is no other"
    with FakeHub({NAME: repository}) as hub:
        found, refused = client.ask_all(hub.url, call(variant="bf16"), call(variant="fp16"))
        assert Path(found["answer"]).is_dir() and hub.downloaded() == set(bf16)
        assert "'fp16'" in refused["problem"] and "bf16" in refused["problem"]


def test_a_revision_is_honoured(repository, client):
    with FakeHub({NAME: repository}) as hub:
        unknown, found = client.ask_all(hub.url, call(revision="v9"), call(revision=hub.commit(NAME)))
        assert "no revision 'v9'" in unknown["problem"]
        assert hub.commit(NAME) in found["answer"]


def test_one_file_of_a_repository(repository, client):
    wanted, key = "scheduler/scheduler_config.json", "validation_preview_decoder"
    with FakeHub({NAME: repository}) as hub:
        calls = [call(name, what="one_file", file=file, key=key)
                 for name, file in ((NAME, wanted), (NAME, "none.pth"), ("someone/else", wanted))]  # fmt: skip
        found, missing, unknown = client.ask_all(hub.url, *calls)
        assert hub.downloaded() == {wanted}
    assert Path(found["answer"]).read_bytes() == (repository / wanted).read_bytes()
    assert missing["problem"].startswith(f"{key}: the repository {NAME} has no file none.pth")
    assert unknown["problem"].startswith(f"{key}: ")


def test_a_cut_connection_goes_on_inside_the_file(repository, client, tmp_path):
    big = shutil.copytree(repository, tmp_path / "big")
    file = "transformer/diffusion_pytorch_model.safetensors"
    _write_zeros(big / file, megabytes=24)  # the client stores pieces of 10 MB
    with FakeHub({NAME: big}, cuts={file: 13_000_000}) as hub:
        folder = Path(client.ask(hub.url)["answer"])
        assert (folder / file).read_bytes() == (big / file).read_bytes()
        starts = [ask.start for ask in hub.requests if ask.method == "GET" and ask.path == f"/cdn/{NAME}/{file}"]
        assert len(starts) == 2 and 10_000_000 <= starts[1] <= 13_000_000, "continued by Range"


def test_a_killed_download_keeps_its_finished_files(repository, client):
    stalled = "transformer/diffusion_pytorch_model.safetensors"
    with FakeHub({NAME: repository}, stalls={stalled}) as hub:
        child = client.start(hub.url)
        assert hub.stalled.wait(120)
        snapshots = client.home / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots"
        wanted = len(needed_files(_repo_files(repository), NAME))
        while len([path for path in snapshots.rglob("*") if path.is_file()]) < wanted - 1:
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.communicate()
        # a torn download is not taken for a model, with or without the hub
        problem = client.ask(hub.url, offline=True)["problem"]
        assert "no complete safetensors weights in transformer/" in problem
        problem = client.ask("http://127.0.0.1:9")["problem"]
        assert "cannot be reached" in problem and "is kept and the next run continues it" in problem
        hub.stalls.clear()
        before = hub.downloaded()
        hub.sent.clear()
        folder = Path(client.ask(hub.url)["answer"])
        assert hub.downloaded() == {stalled} and before > {stalled}
        assert (folder / stalled).read_bytes() == (repository / stalled).read_bytes()


def test_each_refusal_has_its_message(repository, client):
    gated, private, near = "someone/gated", "someone/private", "Efficient-Large-Model/Sana_1600M_1024px_BF16"
    models = {NAME: repository, gated: repository, private: repository, "someone/lora": repository / "vae"}
    tokens = ("", "hf_other")
    with FakeHub(models, gated={gated}, private={private: "hf_good"}, bad_token={NAME}) as hub:
        *refused, wrong_token, not_diffusers, allowed, path = client.ask_all(
            hub.url,
            *[call(gated, token=token) for token in tokens],
            *[call(name, token=token) for name in (near, private) for token in tokens],
            call(token="hf_wrong"),
            call("someone/lora"),
            call(private, token="hf_good"),
            call("someone/lora/vae"),
        )
        for answer in refused[:2]:
            said = answer["problem"]
            assert "is gated" in said and f"{hub.url}/{gated}" in said and "HF_TOKEN" in said
        for answer in refused[2:]:
            assert "no public repository" in answer["problem"]
        assert f"did you mean {near}_diffusers" in refused[2]["problem"]
        assert "refuses the token" in wrong_token["problem"]
        assert "not in diffusers layout" in not_diffusers["problem"]
        assert Path(allowed["answer"]).is_dir()
        assert "there is no folder someone/lora/vae" in path["problem"]
        hub.broken = True
        assert "answered 503" in client.ask(hub.url)["problem"]


def test_a_cache_that_cannot_be_written(repository, tmp_path):
    (tmp_path / "file").touch()
    with FakeHub({NAME: repository}) as hub:
        problem = Client(tmp_path / "file").ask(hub.url)["problem"]
    assert "cannot be stored" in problem and "HF_HOME" in problem


def test_without_network_and_without_a_copy(client):
    problem = client.ask("http://127.0.0.1:9")["problem"]
    assert "cannot be reached" in problem and "http://127.0.0.1:9" in problem and "HF_ENDPOINT" in problem
    problem = client.ask("https://huggingface.co")["problem"]
    assert "cannot be reached" in problem, "the tests' own block looks like a machine without a network"
    refused, unplanned = client.ask_all("http://127.0.0.1:9", call(), call(what="plan_download"), offline=True)
    assert "offline mode is on" in refused["problem"] and "has not been downloaded" in refused["problem"]
    assert unplanned["answer"] == "None"


def _repo_files(folder: Path) -> list[str]:
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > len(COMPONENTS)
    return files


def _write_zeros(path: Path, megabytes: int) -> None:
    """A safetensors file of one tensor of zeros, without torch."""
    size = megabytes * 1_000_000
    header = json.dumps({"zeros": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def test_on_disk_asks_no_network(tmp_path):
    from huggingface_hub import constants

    assert on_disk("nano") == locate("nano")
    assert on_disk("maker/never-heard-of") is None and is_offline()
    with pytest.raises(UserError, match="no folder"):
        on_disk(str(tmp_path / "nowhere"))
    home = Path(constants.HF_HUB_CACHE) / "models--maker--here"
    copy = home / "snapshots" / "abc"
    shutil.copytree(locate("nano"), copy)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    assert on_disk("maker/here") == copy
    (copy / "vae" / "config.json").unlink()
    assert on_disk("maker/here") is None, "the rest must be downloaded"


def test_a_name_that_is_nearly_known():
    name = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    assert likely_meant(name.replace("_diffusers", "")) == name
    assert likely_meant(name) is None and likely_meant("maker/else") is None
