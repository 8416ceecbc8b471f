"""`sana_tune report`: the report of runs from what they left in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sana_tune.errors import Problem, UserError

COMPARED = "report_compared.html"


def report_asked(folders: Sequence[Path], output: Path | None) -> Path:
    """Write it and answer where. Raises UserError, with all that is wrong, for folders that are none of a run."""
    from sana_tune.data.images import shrunk
    from sana_tune.watch.report.page import FILE, Reporter
    from sana_tune.watch.report.reading import is_run

    problems = []
    for folder in folders:
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            problems.append(Problem(str(folder), f"must be the folder of a run (its output_dir); it {found}", _FIX))
        elif not is_run(folder):
            what = "is not the folder of a run: it holds no metrics.jsonl, events.jsonl or plan.json"
            problems.append(Problem(str(folder), what, _FIX))
    if output is not None and output.is_dir():
        fix = f"name a file in it: --output {output / FILE}"
        problems.append(Problem("--output", f"must be a file to write; {output} is a folder", fix))
    if problems:
        raise UserError(*problems)
    path = output or folders[0] / (FILE if len(folders) == 1 else COMPARED)
    Reporter(folders, shrunk).write(path)
    return path


_FIX = "name the folder that the run's settings have as output_dir"
