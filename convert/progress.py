"""The one look of progress: a bar, a note, tokens per second and the time left."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TokenProgress(Progress):
    """A bar over `total` items of `tokens` tokens each; use as a context manager, or start and stop it."""

    def __init__(self, console: Console, total: int, tokens: int, completed: int = 0):
        super().__init__(
            TextColumn("  "),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}  {task.fields[rate]:.0f} tokens/s  left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.tokens = tokens
        self.task = self.add_task("", total=total, completed=completed, note="", rate=0)

    def show(self, completed: int, note: str) -> None:
        """So many items are done; `note` says what of them is worth seeing."""
        self.update(self.task, completed=completed, note=note, rate=(self.tasks[0].speed or 0) * self.tokens)
