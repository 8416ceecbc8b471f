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
from sana_tune.model.fetch import local_folder, locate, needed_files, plan_download
from sana_tune.model.layout import COMPONENTS, list_files
from tests.fake_hub import FakeHub

NAME = "someone/tiny_sana_diffusers"
CALL = """
import json, logging, sys
from sana_tune.errors import UserError
from sana_tune.model import fetch
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
logging.getLogger("httpx").setLevel("WARNING")
what, name, options = json.loads(sys.argv[1])
try:
    print(json.dumps({"answer": str(getattr(fetch, what)(name, **options))}))
except UserError as error:
    print(json.dumps({"problem": str(error)}))
assert "torch" not in sys.modules
"""


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

    def start(
        self, hub_url: str, what: str = "locate", name: str = NAME, token: str = "", **options
    ) -> subprocess.Popen:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": str(options.pop("offline_environment", 0)),
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        }
        if token:
            environment["HF_TOKEN"] = token
        return subprocess.Popen(
            [sys.executable, "-c", CALL, json.dumps([what, name, options])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, hub_url: str, *args, **options) -> dict:
        with self.start(hub_url, *args, **options) as child:
            out, err = child.communicate(timeout=200)
        assert child.returncode == 0, err
        return _Answer(json.loads(out), log=err)


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
    with FakeHub({NAME: repository}) as hub:
        planned = client.ask(hub.url, "plan_download")
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
        again = client.ask(hub.url)
        assert again["answer"] == found["answer"] and hub.sent == before, "the second run downloads nothing"
        assert client.ask(hub.url, "plan_download")["answer"] == "0"
    # without the hub: the copy is used, loudly when it was not asked to be offline
    assert client.ask(hub.url, offline_environment=1)["answer"] == found["answer"]
    unreachable = client.ask(hub.url)
    assert unreachable["answer"] == found["answer"] and "going on with the copy" in unreachable["log"]


def test_the_variant_follows_the_precision_or_the_wish(repository, client):
    names = _repo_files(repository)
    bf16 = needed_files(names, NAME, dtype="bf16")
    assert "transformer/diffusion_pytorch_model.bf16.safetensors" in bf16
    assert "transformer/diffusion_pytorch_model.safetensors" not in bf16
    assert "vae/diffusion_pytorch_model.safetensors" in bf16, "there is no other"
    with FakeHub({NAME: repository}) as hub:
        assert "answer" in client.ask(hub.url, variant="bf16")
        assert hub.downloaded() == set(bf16)
        problem = client.ask(hub.url, variant="fp16")["problem"]
        assert "'fp16'" in problem and "bf16" in problem


def test_a_revision_is_honoured(repository, client):
    with FakeHub({NAME: repository}) as hub:
        problem = client.ask(hub.url, revision="v9")["problem"]
        assert "no revision 'v9'" in problem
        folder = client.ask(hub.url, revision=hub.commit(NAME))["answer"]
        assert hub.commit(NAME) in folder


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
        blobs = client.home / "hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
        wanted = len(needed_files(_repo_files(repository), NAME))
        while len([path for path in blobs.iterdir() if not path.name.endswith(".incomplete")]) < wanted - 1:
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.communicate()
        # a torn download is not taken for a model, with or without the hub
        problem = client.ask(hub.url, offline_environment=1)["problem"]
        assert "no complete safetensors weights in transformer/" in problem
        hub.stalls.clear()
        before = hub.downloaded()
        hub.sent.clear()
        folder = Path(client.ask(hub.url)["answer"])
        assert hub.downloaded() == {stalled} and before > {stalled}
        assert (folder / stalled).read_bytes() == (repository / stalled).read_bytes()


def test_each_refusal_has_its_message(repository, client):
    gated, private = "someone/gated", "someone/refuses_token"
    models = {NAME: repository, gated: repository, private: repository, "someone/lora": repository / "vae"}
    with FakeHub(models, gated={gated}, bad_token={private}) as hub:
        for token in ("", "hf_other"):
            problem = client.ask(hub.url, name=gated, token=token)["problem"]
            assert "is gated" in problem and f"{hub.url}/{gated}" in problem and "HF_TOKEN" in problem
            problem = client.ask(hub.url, name="Efficient-Large-Model/Sana_1600M_1024px_BF16", token=token)["problem"]
            assert "no public repository" in problem
            assert "did you mean Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers" in problem
        assert "refuses the token" in client.ask(hub.url, name=private, token="hf_wrong")["problem"]
        assert "not in diffusers layout" in client.ask(hub.url, name="someone/lora")["problem"]
        hub.broken = True
        assert "answered 503" in client.ask(hub.url)["problem"]


def test_a_private_model_needs_its_token(repository, client):
    with FakeHub({NAME: repository}, private={NAME: "hf_good"}) as hub:
        for token in ("", "hf_other"):
            assert "no public repository" in client.ask(hub.url, token=token)["problem"]
        assert Path(client.ask(hub.url, token="hf_good")["answer"]).is_dir()


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
    problem = client.ask("http://127.0.0.1:9", offline_environment=1)["problem"]
    assert "offline mode is on" in problem and "has not been downloaded" in problem
    assert client.ask("http://127.0.0.1:9", "plan_download", offline_environment=1)["answer"] == "None"


def _repo_files(folder: Path) -> list[str]:
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > len(COMPONENTS)
    return files


def _write_zeros(path: Path, megabytes: int) -> None:
    """A safetensors file of one tensor of zeros, without torch."""
    size = megabytes * 1_000_000
    header = json.dumps({"zeros": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
