"""{env:VAR} and a dataset's {names}."""

from __future__ import annotations

from sana_tune.config.findings import Findings
from sana_tune.config.placeholders import expand_env, expand_names


def test_variables_are_put_in_everywhere_in_a_value() -> None:
    found = Findings()
    value, used = expand_env({"a": ["{env:X}/y", 3], "b": "no"}, "here", {"X": "x"}, found)
    assert value == {"a": ["x/y", 3], "b": "no"} and used == ("X",) and found.problems == []


def test_an_unset_variable_is_a_problem() -> None:
    found = Findings()
    expand_env("{env:NONE}/pictures", "config.json: output_dir", {}, found)
    assert "config.json: output_dir: the environment variable 'NONE' is not set" in str(found.problems[0])


def test_names_in_paths_are_strict_and_in_texts_are_not() -> None:
    found = Findings()
    names = {"id": "cats", "output_dir": "out"}
    assert expand_names("{output_dir}/{id}", "here", names, found, strict=True) == "out/cats"
    assert expand_names("a {curly} prompt", "here", names, found, strict=False) == "a {curly} prompt"
    assert found.problems == []
    expand_names("{oputput_dir}/x", "here", names, found, strict=True)
    assert "there is no placeholder {oputput_dir}" in str(found.problems[0])
