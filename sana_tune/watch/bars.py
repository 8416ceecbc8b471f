"""Progress bars on a terminal, drawn by rich: a row for each task and one line of numbers below."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class TimeLeft(TimeRemainingColumn):
    """The task's own `left` where it has one, else rich's estimate."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        return super().render(task) if left is None else Text(left, style="progress.remaining")


class Bars(Progress):
    """Rows of bars that fit 80 columns, with a line below that is cut where the terminal ends."""

    def __init__(self, console: Console, refresh_per_s: float):
        self.below = ""
        self._rows: dict[str, TaskID] = {}
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeLeft(compact=True),
            console=console,
            refresh_per_second=refresh_per_s,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.below:
            yield Text(self.below, no_wrap=True, overflow="ellipsis")

    def show(self, title: str, done: int, total: int, left: str | None = None, below: str = "") -> None:
        """Set the row of that title, made when it is new, and the line below: without one, how many a second."""
        if title not in self._rows:
            self._rows[title] = self.add_task(title, total=total, left=left)
        self.update(self._rows[title], completed=done, total=total, left=left)
        speed = next(task.finished_speed or task.speed for task in self.tasks if task.id == self._rows[title])
        self.below = below or (f"{speed:.1f} a second" if speed else "")
