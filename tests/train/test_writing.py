"""The files of a checkpoint: hashed while written, as safetensors writes them, errors kept till the end."""

from __future__ import annotations

import errno
import hashlib
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_tune.train.writing import CHUNK_BYTES, LONGEST_REST_S, Abandoned, HashedFile, Terms, write_tensors


def test_what_is_written_is_hashed(tmp_path: Path):
    file = HashedFile(tmp_path / "f", Terms())
    data = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the end"
    assert file.write(data) == len(data) and file.write(memoryview(b"more")) == 4
    entry = file.close()
    whole = (tmp_path / "f").read_bytes()
    assert whole == data + b"more"
    assert entry == {"sha256": hashlib.sha256(whole).hexdigest(), "size": len(whole)}


def test_tensors_are_written_byte_for_byte_as_the_library_does(tmp_path: Path):
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(2, 2, dtype=torch.bfloat16), "ä": torch.arange(4),
        "t": torch.randn(4, 2).t().contiguous(), "none": torch.zeros(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float16), "yes": torch.tensor([True, False]),
        "c": torch.arange(3, dtype=torch.int8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    file = HashedFile(tmp_path / "ours", Terms())
    write_tensors(file, tensors)
    file.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours").keys() == tensors.keys()


def test_a_tensor_that_is_not_contiguous_is_written_in_order(tmp_path: Path):
    tensor = torch.randn(4, 6).t()[::2]
    file = HashedFile(tmp_path / "f", Terms())
    write_tensors(file, {"x": tensor})
    file.close()
    assert torch.equal(load_file(tmp_path / "f")["x"], tensor)


def test_an_error_waits_for_the_end(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        file = HashedFile(tmp_path / "f", Terms())
        assert torch.save({"x": torch.zeros(5000)}, file) is None, "torch's writer is not disturbed"  # pyright: ignore
        with pytest.raises(OSError) as caught:
            file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_given_up_it_writes_no_more(tmp_path: Path):
    terms = Terms()
    file = HashedFile(tmp_path / "f", terms)
    file.write(b"begun")
    terms.abandoned.set()
    file.write(b"not any more")
    with pytest.raises(Abandoned):
        file.close()
    assert (tmp_path / "f").read_bytes() == b"begun"


class Rested(threading.Event):
    """Notes for how long was waited, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.times_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.times_s.append(timeout or 0.0)
        return self.is_set()


@pytest.mark.parametrize("rests, hurried, times", [(True, False, 3), (True, True, 0), (False, False, 0)])
def test_after_each_piece_it_rests_unless_it_is_waited_for(tmp_path: Path, rests: bool, hurried: bool, times: int):
    hurry = Rested()
    if hurried:
        hurry.set()
    file = HashedFile(tmp_path / "f", Terms(rests, hurry=hurry))
    file.write(bytes(3 * CHUNK_BYTES))
    assert len(hurry.times_s) == times and all(0 < rest <= LONGEST_REST_S for rest in hurry.times_s)
    assert file.close()["size"] == (tmp_path / "f").stat().st_size == 3 * CHUNK_BYTES
