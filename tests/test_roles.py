"""What datasets are for and when they are shown, from the settings; pictures that are held out and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import Loaded, load
from sana_tune.data.buckets import Bucket
from sana_tune.data.geometry import Size
from sana_tune.data.records import Role
from sana_tune.data.timeline import Window
from sana_tune.errors import UserError
from sana_tune.plan import DatasetPlan
from sana_tune.roles import (
    dataset_plans,
    held_out_copies,
    held_out_warning,
    is_regularised,
    learns_from_base,
    priced,
    timeline_for,
    windows,
)
from tests.config.helpers import write_list
from tests.data.pictures import record


def asked(folder: Path, *entries: dict[str, Any], **settings: Any) -> Loaded:
    of_texts = [entry for entry in entries if entry.get("dataset_type") == "text_embeds"]
    listed = [entry if entry in of_texts else {"instance_data_dir": str(entry["id"]), **entry} for entry in entries]
    return load(write_list(folder, settings, listed), {}, {})


def bucket(name: str, role: Role = Role.TRAIN, pictures: int = 4) -> Bucket:
    return Bucket(name, Size(64, 64), tuple(range(pictures)), 1, 0, role)


def test_what_each_dataset_is_for(tmp_path: Path):
    loaded = asked(
        tmp_path,
        {"id": "a", "conditioning_data": "m", "probability": 0.5, "start_epoch": 0, "end_step": 0},
        {"id": "b", "is_regularization_data": True, "start_epoch": 2, "end_step": 9, "text_embeds": "t"},
        {"id": "c", "dataset_type": "eval", "repeats": 3},
        {"id": "m", "dataset_type": "conditioning", "conditioning_type": "segmentation"},
        {"id": "first", "dataset_type": "text_embeds"},
        {"id": "t", "dataset_type": "text_embeds"},
        regularisation_target="base",
    )
    assert dataset_plans(loaded) == (
        DatasetPlan("a", "train", 0.5, masks="m", mask_kind="segmentation"),
        DatasetPlan("b", "regularise", start_epoch=2, end_step=9, text_cache="t", target="base"),
        DatasetPlan("c", "eval"),
    )
    assert windows(loaded) == {"a": Window(), "b": Window(2, 0, None, 9), "c": Window()}
    assert windows(loaded)["a"].is_always and not windows(loaded)["b"].is_always


def test_a_timeline_only_where_a_dataset_starts_or_ends(tmp_path: Path):
    plain = asked(tmp_path, {"id": "a"}, {"id": "b"})
    assert timeline_for(plain, [bucket("a"), bucket("b")]) is None
    later = asked(tmp_path, {"id": "a"}, {"id": "b", "start_step": 3}, gradient_accumulation_steps=2)
    timeline = timeline_for(later, [bucket("a"), bucket("b")])
    assert timeline is not None and {timeline.at(index)[1] for index in range(4)} == {0}
    assert timeline.at(4)[0] == 1, "in step 3, the first epoch of four micro-batches is over"
    assert timeline_for(later, [bucket("a")]) is None, "b has no pictures"
    with pytest.raises(UserError, match="no dataset is shown in the first step; b start later"):
        timeline_for(later, [bucket("b")])
    assert timeline_for(plain, [bucket("a"), bucket("b", Role.EVAL)]) is None


def test_the_base_model_is_kept_where_something_learns_from_it(tmp_path: Path):
    config = asked(tmp_path, {"id": "a"}, regularisation_target="base").config
    ordinary, regular = [bucket("a")], [bucket("a", Role.REGULARISE)]
    assert (is_regularised(ordinary), is_regularised(regular)) == (False, True)
    assert (learns_from_base(config, ordinary), learns_from_base(config, regular)) == (False, True)
    assert priced(config, ordinary).train.regularisation_target == "data" and priced(config, regular) is config
    data = asked(tmp_path, {"id": "a"}).config
    assert not learns_from_base(data, regular) and priced(data, regular) is data


def test_held_out_pictures_that_are_trained_are_told():
    taught = [record("a.png"), replace(record("b.png", dataset="more"), role=Role.REGULARISE)]
    held = [
        replace(record(name, dataset="held"), role=Role.EVAL, content_hash=content)
        for name, content in (("x.png", "hash of a.png"), ("y.png", "hash of b.png"), ("z.png", "z"), ("n.png", None))
    ]
    (warning,) = held_out_copies([*held, *taught])
    assert warning.startswith("2 pictures that are held out are among the trained ones")
    assert "held/x.png is the same file as cats/a.png; held/y.png is the same file as more/b.png" in warning
    assert held_out_copies([*held[2:], *taught, replace(taught[0], content_hash=None)]) == ()
    assert held_out_copies([*taught, replace(taught[0], key="c.png")]) == (), "trained twice is no leak"
    (many,) = held_out_warning([(f"h{n}", f"t{n}") for n in range(7)], "much like")
    assert "h4 is much like t4; and 2 more" in many
