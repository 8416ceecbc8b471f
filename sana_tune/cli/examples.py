"""Copying a packaged example so that the copy stands on its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from sana_tune.config.describe import schema_path
from sana_tune.config.files import EXAMPLES_PREFIX, examples_dir, list_examples
from sana_tune.errors import Problem, UserError

_SCHEMA = re.compile(r'("\$schema": )"[^"]*/(\w+)\.schema\.json"')


def copy_example(name: str, dest: Path | None) -> Path:
    """Copy the example `name` to `dest` (default config/examples/<name>), rewriting its own paths and the schema's.

    Raises UserError when there is no such example or the folder exists and is not empty.
    """
    if name not in list_examples():
        known = ", ".join(list_examples()) or "none"
        raise UserError(Problem("examples copy", f"there is no example {name!r}; known: {known}", "name one of them"))
    target = dest or Path(EXAMPLES_PREFIX) / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            Problem(f"examples copy: {target}", "the folder must be new or empty", "name another: --dest DIR")
        )
    try:
        shutil.copytree(examples_dir() / name, target, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(Problem(f"examples copy: {target}", f"cannot be written: {error.strerror}", "")) from None
    for path in target.rglob("*.json"):
        text = path.read_text(encoding="utf-8").replace(f"{EXAMPLES_PREFIX}{name}/", f"{target.as_posix()}/")
        text = _SCHEMA.sub(lambda found: found[1] + json.dumps(schema_path(found[2]).as_posix()), text)
        if target.name != name:  # a copy of another name is a run of its own
            text = text.replace(f'"output/{name}"', f'"output/{target.name}"')
        path.write_text(text, encoding="utf-8")
    return target
