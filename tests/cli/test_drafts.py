"""Which files the wizard writes, where, and what stands in the way. Nothing is written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.drafts import draft, find_files, other_settings, read_existing, shown
from sana_tune.cli.merge import Existing
from sana_tune.cli.questions import State
from sana_tune.config.describe import schema_path
from sana_tune.errors import UserError
from tests.cli.script import CPU, answers


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(path: str, content: Any = None) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content if isinstance(content, str) else json.dumps(content or {}), encoding="utf-8")
    return Path(path)


def state(existing: Existing | None = None) -> State:
    given = answers()
    known = {name: getattr(given, name) for name in ("model", "pictures", "captions", "target", "resolutions")}
    return State(CPU, existing, Path.cwd(), {}, {}, known)


def contents(made: Any) -> dict[str, Any]:
    return {str(path): json.loads(data) for path, data in made.files}


# ---- where ----


@pytest.mark.parametrize(
    "flags, environ, new",
    [
        ((None, None), {}, "config/config.json"),
        (("mine", None), {}, "mine.json"),
        (("mine/", None), {}, "mine/config.json"),
        (("'my folder/a.json'", None), {}, "my folder/a.json"),
        (("a.toml", None), {}, "a.json"),
        ((None, "dog"), {}, "config/dog/config.json"),
        ((None, None), {"CONFIG_PATH": "p/c.json"}, "p/c.json"),
        ((None, "dog"), {"CONFIG_PATH": "p/c.json"}, "config/dog/config.json"),
        ((None, None), {"SIMPLETUNER_ENV": "cat"}, "config/cat/config.json"),
        ((None, None), {"SIMPLETUNER_ENV": "default", "ENV": "production"}, "config/config.json"),
    ],
)
def test_a_new_config_goes_where_it_is_wanted(flags, environ, new):
    assert find_files(*flags, environ, Path.cwd()) == (None, Path(new))


@pytest.mark.parametrize(
    "there, flags, environ, new",
    [
        ("config.json", (None, None), {}, "config.json"),
        ("config/config.json", (None, None), {}, "config/config.json"),
        ("config/config.toml", (None, None), {}, "config/config.json"),
        ("config/dog/config.json", (None, "dog"), {}, "config/dog/config.json"),
        ("mine/config.json", ("mine", None), {}, "mine/config.json"),
        ("mine/config.yaml", ("mine/", None), {}, "mine/config.json"),
        ("a.json", ("a.json", None), {}, "a.json"),
        ("a.toml", ("a.toml", None), {}, "a.json"),
        ("p/c.json", (None, None), {"CONFIG_PATH": "p/c.json"}, "p/c.json"),
    ],
)
def test_a_config_that_is_there_is_found(there, flags, environ, new):
    put(there)
    found, goes = find_files(*flags, environ, Path.cwd())
    assert found is not None and found.samefile(there) and goes == Path(new)


def test_a_packaged_example_is_read_and_not_written():
    found, goes = find_files("config/examples/nano/config.json", None, {}, Path.cwd())
    assert found is not None and found.is_file() and goes == Path("config/examples/nano/config.json")
    existing = read_existing(found, {})
    assert len(existing.group) == 2 and existing.get("pretrained_model_name_or_path") == "nano"


def test_paths_are_shown_from_here(tmp_path):
    assert shown(tmp_path / "a" / "b", tmp_path) == Path("a/b") and shown(Path("a"), tmp_path) == Path("a")
    assert shown(Path("/elsewhere/x"), tmp_path) == Path("/elsewhere/x")


# ---- what is there ----


def test_every_format_is_read():
    put("d.json", [{"id": "a", "instance_data_dir": "x"}])
    for name, text in (
        ("c.json", '{"data_backend_config": "d.json", "seed": 3}'),
        ("c.toml", 'data_backend_config = "d.json"\nseed = 3\n'),
        ("c.yaml", "data_backend_config: d.json\nseed: 3\n"),
        ("c.env", "DATALOADER_CONFIG=d.json\nTRAINER_EXTRA_ARGS='--seed=3'\n"),
    ):
        existing = read_existing(put(name, text), {})
        assert str(existing.get("seed")) == "3" and existing.group[0]["id"] == "a", name
        assert existing.datasets_path == Path("d.json")


def test_a_place_from_the_environment():
    put("data/d.json", [{"id": "a", "instance_data_dir": "x"}])
    existing = read_existing(put("c.json", {"data_backend_config": "{env:DATA}/d.json"}), {"DATA": "data"})
    assert existing.group


def test_files_that_cannot_be_read_are_not_replaced_blindly():
    for text in ("{", "[]", '{"a": 1, "a": 2}'):
        with pytest.raises(UserError):
            read_existing(put("c.json", text), {})
    put("d.json", "{")
    with pytest.raises(UserError, match=r"d\.json"):
        read_existing(put("c.json", {"data_backend_config": "d.json"}), {})
    assert read_existing(put("c.json", {"data_backend_config": "gone.json"}), {}).datasets is None


def test_settings_that_are_otherwise():
    recommended = {
        "train_batch_size": 4, "weights_dtype": "fp32", "use_ema": True, "gradient_checkpointing": False,
        "gradient_checkpointing_interval": 1, "optimizer": "optimi-adamw",
    }  # fmt: skip
    existing = Existing(Path("c"), {"train_batch_size": "4", "use_ema": "True", "gradient_checkpointing_interval": 3})
    assert other_settings(existing, recommended) == {"gradient_checkpointing": False}
    assert other_settings(existing, {**recommended, "weights_dtype": "bf16"})["weights_dtype"] == "bf16"
    assert "gradient_checkpointing_interval" in other_settings(
        existing, {**recommended, "gradient_checkpointing": True}
    )


# ---- what will be there ----


def test_new_files_config_last():
    made = draft(state(), answers(), Path("config/config.json"), True)
    written = contents(made)
    assert list(written) == ["config/user_prompt_library.json", "config/multidatabackend.json", "config/config.json"]
    assert not (made.in_the_way or made.not_read) and made.config_path == Path("config/config.json")
    config = written["config/config.json"]
    assert next(iter(config)) == "$schema" and Path(config["$schema"]) == schema_path("config")
    assert config["data_backend_config"] == "config/multidatabackend.json"
    assert config["user_prompt_library"] == "config/user_prompt_library.json"
    assert written["config/multidatabackend.json"]["datasets"][0]["instance_data_dir"] == "photos"
    assert not list(Path.cwd().iterdir())


def test_a_config_of_another_name_has_files_of_its_own():
    names = [path.name for path, _ in draft(state(), answers(), Path("mine/dog.json"), True).files]
    assert names == ["dog-user_prompt_library.json", "dog-multidatabackend.json", "dog.json"]


def test_in_a_checkout_the_schema_is_named_from_the_files_folder(monkeypatch):
    root = schema_path("config").parents[3]
    here = state()
    here.cwd = root
    made = draft(here, answers(), Path("config/nowhere/config.json"), True)
    config = contents(made)["config/nowhere/config.json"]
    assert config["$schema"] == "../../sana_tune/assets/schemas/config.schema.json"


def test_text_stays_readable():
    made = draft(state(), answers(prompt="夕方の海辺を走る茶色い犬"), Path("config.json"), True)
    assert "夕方の海辺を走る茶色い犬".encode() in made.files[-1][1]


def test_what_nobody_read_is_in_the_way():
    put("config/multidatabackend.json", [{"id": "old"}])
    put("config/user_prompt_library.json", {"a": "b"})
    put("config/dog/config.json")
    made = draft(state(), answers(), Path("config/config.json"), True)
    assert made.in_the_way == made.not_read == (Path("config/multidatabackend.json"),)
    assert made.elsewhere == Path("config/dog-2/config.json")
    told = "\n".join(made.lines)
    assert "would be lost" in told and "config/user_prompt_library.json: is there already and is used" in told
    assert "config/user_prompt_library.json" not in contents(made)


EXISTING = {
    "--pretrained_model_name_or_path": "nano", "data_backend_config": "d.json", "output_dir": "out", "odd": 1,
    "max_train_steps": 10, "num_train_epochs": 2, "validation_prompt": "p", "train_batch_size": 3,
}  # fmt: skip


def changed(take: bool = False, write_to: str = "c.json", **given: Any) -> Any:
    put("d.json", [{"id": "a", "instance_data_dir": "photos", "resolution": 1024, "caption_strategy": "textfile"}])
    existing = read_existing(put("c.json", EXISTING), {})
    here = state(existing)
    same: dict[str, Any] = {"prompt": "p", "output": "out", "length": existing.length()}
    return draft(here, answers(**{**same, **given}), Path(write_to), take)


def test_only_what_was_answered_otherwise_is_changed():
    made = changed()
    config = contents(made)["c.json"]
    assert config == {**EXISTING, "--pretrained_model_name_or_path": answers().model.name}
    assert "d.json: nothing to change" in made.lines and made.in_the_way == (Path("c.json"),) and not made.not_read
    assert any('--pretrained_model_name_or_path: "nano" → ' in line for line in made.lines)


def test_a_new_length_takes_the_place_of_both():
    config = contents(changed(length=answers().length))["c.json"]
    assert config["max_train_steps"] == 500 and "num_train_epochs" not in config


def test_recommended_settings_are_taken_when_they_are_wanted():
    config = contents(changed(take=True))["c.json"]
    assert config["train_batch_size"] != 3 and config["weights_dtype"] == "bf16" and config["odd"] == 1


def test_lora_becomes_full():
    put("d.json", [{"id": "a", "instance_data_dir": "photos", "resolution": 1024}])
    existing = read_existing(put("c.json", {**EXISTING, "model_type": "lora"}), {})
    assert contents(draft(state(existing), answers(), Path("c.json"), False))["c.json"]["model_type"] == "full"


def test_other_formats_become_json_beside():
    put("d.yaml", "- id: a\n  instance_data_dir: photos\n  resolution: 1024\n  caption_strategy: textfile\n")
    path = put("c.toml", 'pretrained_model_name_or_path = "nano"\ndata_backend_config = "d.yaml"\n')
    made = draft(state(read_existing(path, {})), answers(), Path("c.json"), False)
    written = contents(made)
    assert set(written) == {"d.json", "c.json"} and written["c.json"]["data_backend_config"] == "d.json"
    assert written["d.json"][0]["instance_data_dir"] == "photos" and not made.in_the_way


def test_a_config_without_datasets_gets_them():
    existing = read_existing(put("config.json", {"pretrained_model_name_or_path": "nano"}), {})
    written = contents(draft(state(existing), answers(), Path("config.json"), False))
    assert written["config.json"]["data_backend_config"] == "multidatabackend.json"
    assert written["multidatabackend.json"]["datasets"][0]["id"] == "photos"
