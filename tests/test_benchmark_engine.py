"""The engine's benchmark: what its rewrites must be worth by counting, and that it tells its times."""

from __future__ import annotations

import sys

import pytest

from scripts import benchmark_engine


@pytest.fixture(scope="module")
def counts():
    return benchmark_engine.count(8, True)


def test_counting_finds_what_is_known_of_diffusers(counts):
    """124 kernels a block are 2,480 in all; 34.5 GB moved and 3.6 GiB kept a picture (reference, Cost)."""
    launches, moved, kept = counts["diffusers"]
    assert launches == pytest.approx(2466 / 20, rel=0.02)
    assert 20 * moved == pytest.approx(34.5, rel=0.03)
    assert 20 * kept / 1.073741824 == pytest.approx(3.66, rel=0.03)


def test_the_rewrites_launch_move_and_keep_less(counts):
    theirs, ours = counts["diffusers"], counts["all three"]
    assert ours[0] < theirs[0] and ours[1] < theirs[1]
    assert ours[2] < 0.8 * theirs[2], "a fifth less is kept for the backward pass"
    assert counts["linear attention"][2] < 0.9 * theirs[2] and counts["feed-forward"][2] < theirs[2]


def test_it_tells_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    tiny = {"num_attention_heads": 2, "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
            "cross_attention_dim": 64, "caption_channels": 16}  # fmt: skip
    monkeypatch.setattr(benchmark_engine, "SMALL", tiny)
    monkeypatch.setattr(sys, "argv", "benchmark_engine rewrites --rounds 1 --side 2".split())
    benchmark_engine.main()
    told = capsys.readouterr().out
    assert told.count("ratio") == 10 and "feed-forward" in told and "qk_norm True" in told


def test_the_middle_model_has_30_million_parameters(tmp_path):
    from sana_tune.model.facts import from_folder

    assert from_folder(benchmark_engine.middle_model(tmp_path)).parameters == pytest.approx(30e6, rel=0.05)


def test_stratified_levels_make_the_loss_of_a_batch_steadier():
    assert 0.1 < benchmark_engine.steadiness(8, 40) < 0.95


def test_previews_are_timed_beside_the_plain_sampling():
    """That they cost under 3 % is measured by hand: a test on a machine that others use too could not tell."""
    from sana_tune.model.fetch import locate

    found = benchmark_engine.preview_cost(locate("nano"), 32, 1)
    assert found.without_s > 0 and found.with_s > 0 and -1 < found.share < 10 and -1 < found.cpu_share < 10


def test_the_error_of_a_share_is_that_of_the_median_of_pairs():
    found = benchmark_engine.share_of([1.0, 2.2, 3.6, 4.8], [1.0, 2.0, 3.0, 4.0])
    assert found.share == pytest.approx(0.15) and found.with_s == pytest.approx(2.9) and found.without_s == 2.5
    assert found.error == pytest.approx(0.93 * (0.2 - 0.025) / 2)


def test_the_checks_are_timed_beside_a_step_without_them():
    """That they cost under 0.5 % on a CPU is measured by hand, as above; that the read is small is seen here."""
    tiny = {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 2, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 64, "cross_attention_dim": 256, "caption_channels": 16}  # fmt: skip
    found, read_s = benchmark_engine.check_cost(tiny, 8, 2, 1, "cpu")
    assert 0 < read_s < 0.2 * found.with_s and found.without_s > 0 and -1 < found.share < 10


def test_it_measures_how_long_a_checkpoint_holds_training_up(tmp_path, monkeypatch):
    tiny = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8, "cross_attention_dim": 16}  # fmt: skip
    monkeypatch.setattr(benchmark_engine, "MIDDLE", tiny)
    (found,) = benchmark_engine.delays(*benchmark_engine.saving_parts(), tmp_path, 1)
    assert 0 < found.copy_s <= found.write_s + found.copy_s and found.step_s > 0 and found.alone_s > 0
    assert [path.name[:11] for path in tmp_path.iterdir()] == ["checkpoint-"]
