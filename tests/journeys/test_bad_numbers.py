"""A latent in the cache that is not finite, its checksum right: what a whole run does, says and leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.config.load import Loaded
from sana_tune.data.cache import TensorCache
from sana_tune.errors import UserError
from sana_tune.output import Output
from sana_tune.prepare import prepare
from sana_tune.run import run
from sana_tune.watch.events import Failed, Finished, Noticed, Stepped
from tests.journeys.kit import Heard, differences, metrics_of, output_of, pictures, small_run, state_of

STEPS = 4  # two epochs of four pictures, two a step
PLAIN: dict[str, Any] = {"caption_dropout_probability": 0.0}  # so that every caption is named
PLACE = "the latent of d0/p02.png, as its cache holds it"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """The folder of a run whose numbers are right, with pictures and caches."""
    folder = tmp_path_factory.mktemp("sound")
    pictures(folder / "pictures", 4)
    run(asked(folder, folder / "pictures"))
    return folder


def asked(folder: Path, shown: Path, **settings: Any) -> Loaded:
    return small_run(
        folder, {"instance_data_dir": str(shown)}, **{**PLAIN, "cache_dir": str(folder / "cache"), **settings}
    )


def poisoned(folder: Path, sound: Path, **settings: Any) -> tuple[Loaded, Path]:
    """A run over a copy of the caches in which one picture's latent holds a NaN; and the file where that stands."""
    shutil.copytree(sound / "cache", folder / "cache")
    loaded = asked(folder, sound / "pictures", **settings)
    prepared = prepare(loaded, Output.open(output_of(loaded)))
    (record,) = (record for record in prepared.survey.records if record.key == "p02.png")
    key = prepared.keys.latent(record)
    (place,) = {path.parent for path in (folder / "cache" / "vae").rglob("shard-*.safetensors")}
    cache = TensorCache(place)
    latent = cache.get(key)
    latent.view(-1)[3] = float("nan")
    cache.prune(lambda each: each != key)
    cache.fill([(key, latent)])
    assert TensorCache(place).get(key).isnan().sum() == 1, "and its checksum is right"
    return loaded, place / cache.rescan().items[key].file


def test_the_run_passes_such_steps_over_and_names_the_picture(tmp_path: Path, sound: Path):
    loaded, _ = poisoned(tmp_path, sound)
    heard = Heard()
    run(loaded, sinks=[heard])
    bad = [event.progress.step for event in heard.of(Stepped) if event.skipped]
    assert len(bad) == 2, "once an epoch"
    assert [event.progress.step for event in heard.of(Noticed)] == bad
    for event in heard.of(Noticed):
        assert event.message.startswith(f"step {event.progress.step} was skipped: its loss is not finite")
        assert "d0/p02.png" in event.message
    assert heard.of(Finished)[0].skipped == 2 and heard.of(Failed) == []
    assert [line["step"] for line in metrics_of(output_of(loaded))] == [1, 2, 3, 4]
    state = state_of(output_of(loaded) / f"checkpoint-{STEPS}")
    assert all(value.isfinite().all() for name, value in state.items() if name.startswith("transformer/"))


def test_where_too_many_are_bad_it_ends_with_one_message_and_goes_on_when_mended(
    tmp_path: Path, sound: Path, capsys: pytest.CaptureFixture[str]
):
    loaded, file = poisoned(tmp_path, sound, max_bad_steps=1)
    output = output_of(loaded)
    assert exit_code(["train", "--config", str(tmp_path / "config.json")]) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert f"The first that is not finite: {PLACE}" in said and str(output / "diagnosis.json") in said
    found = json.loads((output / "diagnosis.json").read_text(encoding="utf-8"))
    assert found["finding"]["place"] == PLACE and found["what"] in said.replace("The first", "the first")
    (sample,) = (sample for sample in found["samples"] if sample["id"] == "d0/p02.png")
    assert sample["caption"] == "p 2 of pictures, line 0" and sample["loss"] is None

    heard = Heard()
    with pytest.raises(UserError) as caught:
        run(loaded, sinks=[heard])
    assert [event.message for event in heard.of(Failed)] == [str(caught.value)]
    assert heard.events[-1] == heard.of(Failed)[0], "nothing is told after it"

    file.unlink()  # as the message advises
    run(loaded)
    ended = [state_of(folder / "output" / f"checkpoint-{STEPS}") for folder in (tmp_path, sound)]
    assert differences(*ended) == []
