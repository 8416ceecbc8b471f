from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sana_tune.data.held_out import companions, measured, split_of, with_split
from sana_tune.data.records import Record, Role
from sana_tune.data.survey import DatasetLedger, Ledger, Survey
from tests.data.pictures import dataset, record

FOLDER = Path("unused")


def surveyed(**counts: int) -> Survey:
    """A survey of so many pictures a dataset."""
    records = [record(f"p{number:03}.png", dataset=name) for name, count in counts.items() for number in range(count)]
    return Survey(tuple(records), Ledger(tuple(DatasetLedger(name, count, count) for name, count in counts.items())))


def held(found: Survey) -> list[str]:
    return [each.id for each in found.records if each.role is Role.EVAL]


@pytest.mark.parametrize(
    ("split", "there", "expected"), [(3, 10, 3), (0.2, 10, 2), (0.01, 10, 1), (0.5, 1, 1), (1, 4, 1)]
)
def test_a_split_is_a_number_or_a_share_of_at_least_one(split: float, there: int, expected: int):
    assert split_of(split, there) == expected


def test_held_out_pictures_are_always_the_same_and_told():
    datasets = [dataset(FOLDER, "cats", eval_split=3), dataset(FOLDER, "dogs")]
    found = with_split(surveyed(cats=10, dogs=5), datasets, seed=1)
    assert len(held(found)) == 3 and all(name.startswith("cats/") for name in held(found)) and not found.problems
    assert held(with_split(surveyed(cats=10, dogs=5), datasets, seed=1)) == held(found)
    assert held(with_split(surveyed(cats=10, dogs=5), datasets, seed=2)) != held(found)
    first, second = found.ledger.datasets
    assert (first.trained, len(first.held_out), second.trained) == (7, 3, 5) and found.ledger.balances()
    assert [f"cats/{key}" for key in first.held_out] == held(found)
    bigger = with_split(surveyed(cats=11, dogs=5), datasets, seed=1)
    assert len(set(held(bigger)) & set(held(found))) >= 2, "another picture changes one of them at most"


def test_the_choice_does_not_need_the_bytes():
    unread = surveyed(cats=10)
    unread = replace(unread, records=tuple(replace(each, content_hash=None) for each in unread.records))
    datasets = [dataset(FOLDER, "cats", eval_split=0.3)]
    assert held(with_split(unread, datasets, 0)) == held(with_split(surveyed(cats=10), datasets, 0))


def test_regularisation_data_is_not_split():
    prior = dataset(FOLDER, "cats", eval_split=3, is_regularisation_data=True)
    assert held(with_split(surveyed(cats=10), [prior], 0)) == []


@pytest.mark.parametrize(("split", "count"), [(4, 4), (9, 4), (0.9, 1), (1, 1)])
def test_something_must_be_left_to_train_on(split: float, count: int):
    found = with_split(surveyed(cats=count), [dataset(FOLDER, "cats", eval_split=split)], 0)
    (problem,) = found.problems
    assert problem.where == "dataset cats: eval_split" and "must leave pictures to train on" in problem.what
    assert held(found) == []


def test_a_broken_picture_moves_from_where_it_was():
    found = with_split(surveyed(cats=10), [dataset(FOLDER, "cats", eval_split=3)], 0)
    lost, taught = held(found)[0], next(each.id for each in found.records if each.role is Role.TRAIN)
    left = found.without({lost: "torn", taught: "torn"})
    (ledger,) = left.ledger.datasets
    assert (ledger.trained, len(ledger.held_out), len(ledger.left_out)) == (6, 2, 2) and ledger.balances()


def eval_records(name: str, count: int) -> tuple[Record, ...]:
    return tuple(replace(record(f"{n:02}", dataset=name), role=Role.EVAL) for n in range(count))


def test_so_many_of_each_dataset_are_measured():
    records = (*eval_records("a", 9), *eval_records("b", 2), *(record(f"t{n}", dataset="a") for n in range(5)))
    found = measured(records, 4, seed=3)
    assert [each.dataset for each in found] == ["a"] * 4 + ["b"] * 2 and {each.role for each in found} == {Role.EVAL}
    assert found == measured(records, 4, seed=3) != measured(records, 4, seed=4)
    assert set(measured(records, 3, seed=3)) < set(found), "fewer are some of the same"
    assert len(measured(records, 0, seed=3)) == 11
    assert {each.dataset for each in measured(records, 4, 3, only=("b",))} == {"b"}


def test_companions_are_trained_pictures_that_stay_the_same():
    prior = replace(record("r", dataset="prior"), role=Role.REGULARISE)
    taught = tuple(record(f"t{n}", dataset=name) for name in ("a", "fresh") for n in range(6))
    records = (*eval_records("a", 3), prior, *taught)
    found = companions(records, 3, seed=0)
    assert len(found) == 3 and set(found) <= set(taught) and found == companions(records, 3, seed=0)
    assert {each.dataset for each in companions(records, 12, 0, changing={"fresh"})} == {"a"}
    assert len(companions(records, 100, 0)) == 12 and companions(records, 0, 0) == ()
