"""`sana_tune options`: the list, one setting by any of its names, the page, the schemas, and what is misused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.cli.options import FATES, WIDTH, detail, listing, markdown
from sana_tune.config.describe import foreign_keys, groups, options
from sana_tune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert exit_code(["options", *arguments]) == 0
    return capsys.readouterr().out


def test_the_list_is_whole_grouped_and_fits_a_terminal(capsys):
    text = said(capsys)
    lines = text.splitlines()
    assert text == listing() + "\n" and max(map(len, lines)) <= WIDTH
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert [head.partition("  (--group ")[0] for head in heads[:-1]] == list(groups().values())
    shown = [line.split(" = ")[0].strip() for line in lines if line.startswith("  ") and line[2] != " "]
    assert shown == [option.name for option in options()]
    assert "  learning_rate = 1e-5  (number, above 0)" in lines and "      peak learning rate" in lines


def test_one_group(capsys):
    lines = said(capsys, "--group", "ema").splitlines()
    assert lines[0] == "Average of the weights (EMA)  (--group ema)"
    assert [line for line in lines if "use_ema" in line] == ["  use_ema = false  (true/false)"]
    assert not any("learning_rate" in line for line in lines)
    assert exit_code(["options", "--group", "emma"]) == 1
    assert "did you mean ema? known: model, data" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["learning_rate", "--learning_rate", "--learning-rate", "learning-rate"])
def test_one_setting_however_it_is_spelt(name, capsys):
    lines = said(capsys, name).splitlines()
    assert lines[:2] == ["learning_rate", "  peak learning rate"]
    assert ("  range         above 0" in lines) and ("  default       1e-5" in lines)


def test_everything_about_a_setting(capsys):
    text = said(capsys, "optimizer", "crop_style", "cache_dir_vae", "train_batch_size")
    assert "    optimi-adamw: AdamW of torch-optimi" in text and "torch-adamw: " in text
    assert "same value    centre = center" in text and "not built yet face: use center, or random" in text
    assert text.count("cache_dir_vae\n") == 2, "one of config.json and one of a dataset"
    assert "config.json; a dataset's own value wins" in text
    assert "unit" not in text and "whole number (pictures)" in text
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    "name, parts",
    [
        ("validation_steps", ("read as validation_step_interval", "validation_step_interval\n", "also read as")),
        ("--enable_watermark", ("enable_watermark: not built yet: accepted with a note",)),
        ("mixflow_enabled", ("mixflow_enabled: not built yet, and it changes what is trained: refused unless",)),
        ("gradient_precision", ("also off: unmodified",)),
        ("trust_remote_code", ("no effect here: no code of a repository is ever run",)),
        ("model_flavour", ("refused unless it is off: name the repository",)),
    ],
)
def test_old_names_say_what_becomes_of_them(name, parts, capsys):
    text = said(capsys, name)
    assert all(part in text for part in parts)


def test_every_name_is_answered():
    names = {*(option.name for option in options()), *(foreign.name for foreign in foreign_keys())}
    assert len(names) >= 300
    for name in names:
        text = detail(name)
        assert text.startswith(name) and max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["learning_rat"], "did you mean learning_rate?"),
        (["--optimizr"], "did you mean optimizer?"),
        (["zzzz"], "`sana_tune options` lists them"),
        (["ema"], "it is a group of settings: sana_tune options --group ema"),
        (["seed", "sed"], "sed: there is no such setting"),
        (["--markdown", "--group", "ema"], "--group and --markdown cannot be combined"),
        (["seed", "--group", "ema"], "--group and NAME cannot be combined"),
        (["--schema", "prompts"], "there are schemas of config and multidatabackend"),
        (["--group"], "requires an argument"),
    ],
)
def test_misuse_is_told(arguments, told, capsys):
    assert exit_code(["options", *arguments]) == 1
    spoken = capsys.readouterr()
    assert told in spoken.err and "Traceback" not in spoken.err and spoken.out == ""


def test_no_setting_is_hidden_by_a_flag_of_the_command():
    assert not {"group", "markdown", "schema", "help"} & {option.name for option in options()}
    with pytest.raises(UserError, match="no such setting"):
        detail("group")


def test_the_page_holds_every_key_once(capsys):
    page = said(capsys, "--markdown")
    assert page == markdown()
    for option in options():
        assert f"\n| `{option.name}`" in page
    for foreign in foreign_keys():
        assert f"`{foreign.name}`" in page
    assert [line[4:] for line in page.splitlines() if line.startswith("### ")][:-1] == [
        one for one, _ in FATES.values()
    ]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) >= 250 and all(row.endswith(" |") for row in rows)
    assert "| `learning_rate` | number, above 0 | `1e-5` | peak learning rate |" in rows


def test_the_schemas_are_printed(capsys):
    assert json.loads(said(capsys, "--schema"))["title"] == "config.json of sana_tune"
    assert said(capsys, "--schema", "config") == said(capsys, "--schema")
    assert json.loads(said(capsys, "--schema", "multidatabackend"))["title"] == "multidatabackend.json of sana_tune"


def test_it_loads_no_torch():
    code = "import sys; from sana_tune.cli.main import exit_code; exit_code(['options', 'seed']); "
    code += "sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_a_part_of_a_name_finds_the_settings_that_have_it(capsys):
    assert exit_code(["options", "shift"]) == 1
    assert "part of these: flow_schedule_shift, flow_schedule_auto_shift" in capsys.readouterr().err
