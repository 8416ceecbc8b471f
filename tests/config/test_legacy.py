"""The table of foreign keys: nothing stands twice, renamed keys lead to ours, off is off."""

from __future__ import annotations

from pathlib import Path

from sana_tune.config import legacy
from sana_tune.config.datasets import DATASET_KINDS
from sana_tune.config.schema import section_of

OURS = {*section_of(), *(key for kind in DATASET_KINDS.values() for key in kind.model_fields)}


def test_each_foreign_key_stands_in_one_table() -> None:
    tables = (legacy.RENAMED, legacy.LATER_TRAINING, legacy.LATER_OUTPUT, legacy.NO_EFFECT, legacy.REFUSED)
    names = [key for table in tables for key in table]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))
    assert not set(names) & set(section_of()), "a setting of ours is no foreign key"


def test_renamed_keys_lead_to_ours() -> None:
    assert [key for key, new in legacy.RENAMED.items() if new not in OURS] == []
    assert [key for key in (*legacy.LATER_VALUES, *legacy.SAME_VALUE) if key not in OURS] == []


def test_off_values() -> None:
    assert legacy.is_off("mixflow_enabled", "false") and legacy.is_off("gradient_precision", "unmodified")
    assert not legacy.is_off("mixflow_enabled", True) and not legacy.is_off("gradient_precision", "fp32")
    assert not legacy.is_off("vae_cache_preprocess", 1), "1 is not true"


def test_every_key_of_simpletuners_files_is_known() -> None:
    """Ours, or on one of the tables: none meets "there is no such setting"."""
    data = Path(__file__).resolve().parents[1] / "data"
    known = {*OURS, *legacy.known_foreign_keys()}
    for name, count in (("keys_config.txt", 279), ("keys_datasets.txt", 83)):
        keys = (data / name).read_text(encoding="utf-8").split()
        assert len(keys) == count
        assert [key for key in keys if key not in known] == []
