"""`Bulk`: one action on many instances or dead letters, a slice at a time, with progress, counts and refusals.

Ctrl-C stops between two instances: those that were begun are finished, and the counts are printed. A second call acts
on the rest, because the first ones are not selected any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import click

from stageflow_actors.cli.progress import Progress
from stageflow_actors.errors import StageFlowError
from stageflow_brokers.errors import BrokerError

__all__ = ["Bulk"]

T = TypeVar("T")

SLICE = 200
"""Number of actions that are handed out at once."""

THREADS = 16
"""Actions at the same time: the broker makes them durable together."""

SHOWN_REFUSALS = 5


class Bulk:
    """What became of many: `outcomes` counts them by a word such as `retried`, `refusals` has (name, reason)."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.outcomes: Counter[str] = Counter()
        self.refusals: list[tuple[str, str]] = []

    def run(self, items: Sequence[T], act: Callable[[T], str], name: Callable[[T], str]) -> None:
        """Call `act` for each item in threads; it returns the word of its outcome, or raises what refuses it."""
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="stageflow-bulk")
        running: list[tuple[T, Future[str]]] = []
        try:
            with Progress(self.label, len(items)) as progress:
                for start in range(0, len(items), SLICE):
                    running = [(item, pool.submit(act, item)) for item in items[start : start + SLICE]]
                    while running:
                        self._take(name(running[0][0]), running[0][1])
                        del running[0]
                        progress.update(self.done, self._counts())
        except KeyboardInterrupt:
            for _, future in running:
                future.cancel()
            for item, future in running:
                if not future.cancelled():
                    self._take(name(item), future)
            left = len(items) - self.done
            click.echo(
                f"interrupted: {self._counts()}, {left:,} not begun; the same command goes on with them", err=True
            )
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def done(self) -> int:
        """The number of items with an outcome or a refusal."""
        return self.outcomes.total() + len(self.refusals)

    def report(self, note: str = "") -> None:
        """Print the counts and the first refusals to stderr."""
        click.echo(f"{self._counts()}{note}", err=True)
        for name, reason in self.refusals[:SHOWN_REFUSALS]:
            click.echo(f"  {name}: {' '.join(reason.split())}", err=True)
        if len(self.refusals) > SHOWN_REFUSALS:
            click.echo(f"  and {len(self.refusals) - SHOWN_REFUSALS:,} more", err=True)

    def _take(self, name: str, future: Future[str]) -> None:
        try:
            self.outcomes[future.result()] += 1
        except (StageFlowError, BrokerError) as error:
            self.refusals.append((name, str(error)))

    def _counts(self) -> str:
        parts = [f"{count:,} {word}" for word, count in self.outcomes.items()]
        parts += [f"{len(self.refusals):,} refused"] if self.refusals else []
        return ", ".join(parts) or f"0 {self.label}"
