"""lycoris_config: every setting keeps its meaning and its fraction, and every mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.lycoris import ADAPTER, WHOLE, LycorisFile, lycoris_of, read_lycoris
from sana_tune.errors import UserError

PLAIN = {"algo": "lokr", "linear_dim": 16, "linear_alpha": 8}
EXAMPLE = Path(__file__).parents[2] / "config" / "lycoris_config.json.example"


def test_the_example_is_read_as_its_writer_means_it(tmp_path: Path):
    path = tmp_path / "lycoris.json"
    path.write_text(EXAMPLE.read_text())
    file = read_lycoris(str(path))
    assert (file.algo, file.full_matrix, file.factor, file.rank) == ("lokr", True, 16, 10000)
    assert file.target_module == ("Attention", "GLUMBConv"), "what a feed-forward is called in Sana"
    assert file.module_algo_map["GLUMBConv"].factor == 8


def test_numbers_keep_their_fraction():
    file = lycoris_of({**PLAIN, "multiplier": 0.5, "linear_alpha": 1.5}, "f")
    assert (file.multiplier, file.alpha) == (0.5, 1.5)


def test_what_is_written_means_the_same():
    map_ = {"FeedForward": {"factor": 8, "algo": "loha", "linear_dim": 4}}
    content = {**PLAIN, "bypass_mode": True, "apply_preset": {"target_module": ["Linear"], "module_algo_map": map_}}
    file = lycoris_of(content, "f")
    again = lycoris_of(json.loads(json.dumps(file.to_json())), "g")
    assert again == file and again.digest_text() == file.digest_text()
    assert file.module_algo_map["GLUMBConv"].dim == 4
    assert lycoris_of({**PLAIN, "linear_dim": 8}, "f").digest_text() != file.digest_text()


def test_a_whole_lokr_needs_no_rank_and_lora_is_locon():
    assert lycoris_of({"algo": "lokr", "full_matrix": True, "multiplier": 1.0}, "f").rank == 10000
    assert lycoris_of({**PLAIN, "algo": "LoRA"}, "f").algo == "locon"
    assert lycoris_of({**PLAIN, "use_scalar": False, "dropout": 0.0}, "f") == lycoris_of(PLAIN, "f")
    assert LycorisFile().target_module == ("Attention", "GLUMBConv")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([], ('a LyCORIS file is {"algo"',)),
        ({}, ("algo is missing", "linear_dim is missing", "linear_alpha is missing")),
        ({**PLAIN, "algo": "boft"}, ("boft is not supported", "use lokr")),
        ({**PLAIN, "factr": 4}, ("f: factr: there is no such setting", "did you mean factor?")),
        ({**PLAIN, "linear_dim": 0}, ("linear_dim",)),
        ({**PLAIN, "use_scalar": True}, ("use_scalar: cannot be used",)),
        ({**PLAIN, "rank_dropout": 0.1, "train_norm": True}, ("rank_dropout: cannot", "train_norm: cannot")),
        ({**PLAIN, "apply_preset": []}, ("apply_preset: must be an object",)),
        ({**PLAIN, "apply_preset": {"module_algo_map": []}}, ("module_algo_map: must be an object",)),
        ({**PLAIN, "apply_preset": {"module_algo_map": {"Attention": {"rank": 4}}}}, ("Attention: rank", "dim")),
        ({**PLAIN, "apply_preset": {"module_algo_map": {"Attention": 4}}}, ("Attention: must be an object",)),
        ({**PLAIN, "apply_preset": {"target_modul": ["x"]}}, ("apply_preset: target_modul", "target_module?")),
    ],
)
def test_mistakes_are_told_all_at_once(content: Any, parts: tuple[str, ...]):
    with pytest.raises(UserError) as told:
        lycoris_of(content, "f")
    for part in parts:
        assert part in str(told.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="lycoris_config"):
        read_lycoris(str(tmp_path / "none.json"))


def test_layouts_name_the_average_by_its_suffix():
    for layout in (WHOLE, ADAPTER):
        assert layout.of("") == layout.weights and layout.of("_ema") == layout.average
