"""What stands in the way of telling others of a run, as far as this machine knows: told before the run, all at once."""

from __future__ import annotations

from sana_tune.config.schema import WatchConfig
from sana_tune.errors import Problem
from sana_tune.watch.hub import hub_problems
from sana_tune.watch.scripts import script_problems
from sana_tune.watch.trackers import tracker_problems


def watch_problems(settings: WatchConfig) -> list[Problem]:
    """Trackers that are not installed or not logged in, a missing token, scripts that cannot run. No network."""
    return [*tracker_problems(settings.report_to), *hub_problems(settings), *script_problems(settings)]
