"""What people see of a batch while it runs: a table, or plain lines where nobody watches."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Any

from ..errors import escaped, shortened
from ..remaining import clock_time
from ..terminal import STAGES
from .pool import Hand, Pool

_LINE = 60  # seconds between plain lines that tell how far it is


class Table(AbstractContextManager):
    """Draws to stderr."""

    def __init__(self, known: int, total: int, quiet: bool):
        """
        Args:
            known: jobs that were done before.
            total: jobs of the batch, with those.
        """
        self.known, self.total, self.quiet = known, total, quiet
        self.stream, self.told = sys.stderr, time.monotonic()
        self.began: float | None = None  # when the first job did
        self.live = None
        if not quiet and self.stream.isatty():
            try:
                from rich.console import Console
                from rich.live import Live

                # what Ray prints goes nowhere, and not through the table
                self.live = Live(console=Console(file=self.stream), auto_refresh=False, transient=True,
                                 redirect_stdout=False, redirect_stderr=False)  # fmt: skip
            except ImportError:  # lines do as well
                pass

    def __enter__(self) -> "Table":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live is not None:
            self.live.stop()

    def tell(self, line: str):
        if self.quiet:
            return
        if self.live is not None:
            self.live.console.print(escaped(line), markup=False, highlight=False, soft_wrap=True)
        else:
            print(escaped(line), file=self.stream, flush=True)

    def draw(self, pool: Pool):
        """Shows where the batch is now."""
        if self.live is not None:
            self.live.update(self._table(pool), refresh=True)
        elif not self.quiet and time.monotonic() - self.told >= _LINE:
            self.told = time.monotonic()
            self.tell(self.head(pool))
            for hand in pool.running:
                self.tell(f"  {', '.join(filter(None, cells(hand)))}")

    def head(self, pool: Pool) -> str:
        """A line: how many jobs wait, run, are done and failed, and how long it will take."""
        failed = sum(job.result["status"] == "failed" for job in pool.finished)
        done, running = len(pool.finished) - failed + self.known, len(pool.running)
        told = f"{len(pool.waiting)} waiting, {running} running, {done} of {self.total} done, {failed} failed"
        share = len(pool.finished) + sum(hand.told.get("share", 0.0) for hand in pool.running)
        if self.began is None and pool.running:
            self.began = time.monotonic()
        if self.began is not None and share > 0.02 * max(1, running):
            took = time.monotonic() - self.began
            left = took * (self.total - self.known - share) / share
            told += f", {clock_time(left)} left"
        return told

    def _table(self, pool: Pool) -> Any:
        from rich.console import Group
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(box=None, pad_edge=False)
        for column in ("worker", "job", "stage", "speed", "left"):
            drawn.add_column(column, overflow="ellipsis", no_wrap=True)
        most = max(4, self.live.console.height - 6)
        for hand in pool.hands[:most]:
            drawn.add_row(*map(Text, cells(hand)))
        if len(pool.hands) > most:
            drawn.add_row(f"and {len(pool.hands) - most} more")
        return Group(Text(self.head(pool)), drawn)


def cells(hand: Hand) -> list[str]:
    """Of a worker: itself, its job, the stage, steps a second, and how long the job will take."""
    name = f"{hand.name} ({hand.node})" if hand.node else hand.name
    if hand.job is None:
        return [name, {"starting": "is being started", "gone": "can't work"}.get(hand.state, ""), "", "", ""]
    told = hand.told
    stage = STAGES.get(told.get("stage"), told.get("stage") or "...")
    at = f"{stage} {told['step']}/{told['total']}" if "step" in told and told["stage"] in STAGES else stage
    rate = f"{told['rate']:.3g} steps/s" if "rate" in told and told["stage"] == "tune" else ""
    left = told.get("left", "").rpartition(", ")[2].split(" left")[0] if " left" in told.get("left", "") else ""
    return [name, escaped(shortened(hand.job.name, 60)), at, rate, left and f"{left} left"]
