"""Writes what follows from the settings: docs/options.md and the JSON Schemas in sana_tune/assets/schemas.

python scripts/build_docs.py            write what is out of date
python scripts/build_docs.py --check    write nothing; exit 1 when something is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also where sana_tune is not installed

from sana_tune.cli.options import markdown, schema_text  # noqa: E402
from sana_tune.config.describe import SCHEMAS, schema_path  # noqa: E402


def pages() -> dict[Path, str]:
    """Every generated file with its text."""
    return {ROOT / "docs" / "options.md": markdown(), **{schema_path(name): schema_text([name]) for name in SCHEMAS}}


def stale(wanted: dict[Path, str]) -> list[Path]:
    """The files that are missing or hold something else."""
    return [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(arguments: list[str] | None = None) -> int:
    """Write, or check; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is out of date")
    check = parser.parse_args(arguments).check
    wanted = pages()
    old = stale(wanted)
    for path in old:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
