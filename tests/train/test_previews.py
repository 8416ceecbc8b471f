"""Previews come in order, on the thread that draws, and one that fails stops nothing but itself."""

from __future__ import annotations

import threading

import pytest
import torch

from sana_tune.progress import Progress
from sana_tune.train.previews import Previews
from sana_tune.train.validate import Picture
from sana_tune.watch.events import Previewed

PICTURE = Picture("a b", "text", 64, 64, 0, 0, slug="a-b", steps=20)


def drawn(previews: Previews, picture: Picture = PICTURE) -> None:
    """What a sampler does."""
    showing = previews.of(picture, Progress(7))
    try:
        for step in range(1, picture.steps + 1):
            showing(step, lambda step=step: torch.full((1, 4, 2, 2), float(step)))
    finally:
        showing.close()


def pixels(latents: torch.Tensor) -> torch.Tensor:
    return latents[0, :3].permute(1, 2, 0).to(torch.uint8)


def test_at_5_10_15_and_20_in_order():
    heard: list[tuple[Previewed, int]] = []
    previews = Previews(
        pixels, lambda array: bytes(array[0, 0]), lambda event: heard.append((event, threading.get_ident())), 5
    )
    drawn(previews)
    assert [event for event, _ in heard] == [
        Previewed(Progress(7), "a-b", step, 20, bytes([step] * 3)) for step in (5, 10, 15, 20)
    ]
    assert {thread for _, thread in heard} == {threading.get_ident()}


def test_only_what_is_shown_is_decoded():
    asked: list[float] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        asked.append(float(latents[0, 0, 0, 0]))
        return pixels(latents)

    drawn(Previews(decode, lambda array: b"", lambda event: None, 8))
    assert asked == [8, 16, 20]


@pytest.mark.parametrize("breaks", ["decode", "encode"])
def test_one_that_fails_ends_the_previews_and_nothing_else(breaks, caplog):
    def fail(value):
        raise RuntimeError("out of memory")

    heard: list[Previewed] = []
    previews = Previews(
        fail if breaks == "decode" else pixels, fail if breaks == "encode" else (lambda array: b""), heard.append, 5
    )
    drawn(previews)
    drawn(previews)
    assert heard == [] and previews.broken
    assert [record.getMessage() for record in caplog.records if "preview failed" in record.getMessage()] == [
        "a preview failed, and there will be none any more; pictures are drawn as before: RuntimeError: out of memory"
    ]
