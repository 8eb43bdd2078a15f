"""Dead letters that a command acts on: found by queue, workflow and error, and requeued or deleted in slices."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from stageflow_actors.cli.progress import Progress
from stageflow_actors.cli.selection import unknown_workflow
from stageflow_actors.core.plan import DLQ_PREFIX
from stageflow_actors.core.plural import pluralize
from stageflow_brokers.errors import Refused

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.attach import Attached

__all__ = [
    "FoundLetter",
    "LetterFilter",
    "check_workflow",
    "describe_letters",
    "find_letters",
    "found_letter",
    "iterate_letters",
    "purge_letters",
    "queues_with_letters",
    "requeue_letters",
]

PAGE = 1_000
"""Dead letters that are read, requeued or deleted at once."""

Letter = Mapping[str, Any]
"""A dead letter, as `peek` of the broker describes it."""


class FoundLetter(NamedTuple):
    """One selected dead letter, without its body."""

    queue: str
    id: int
    workflow_id: str
    evidence: bool


@dataclass(frozen=True)
class LetterFilter:
    """The dead letters of a queue, a workflow and an error; empty or None selects all."""

    queue: str = ""
    workflow: str | None = None
    error: str | None = None

    @property
    def selects(self) -> bool:
        """True if it selects by workflow or error."""
        return (self.workflow, self.error) != (None, None)

    def accepts(self, letter: Letter) -> bool:
        """Return True if a dead letter of the queue is of that workflow and error."""
        from stageflow_actors.core.description import failure_text

        if self.workflow is not None and _workflow_of(letter) != self.workflow:
            return False
        return self.error is None or self.error in (failure_text(letter["reason"] or letter["failure"]) or "")


def queues_with_letters(attached: Attached, queue: str) -> list[tuple[str, int]]:
    """Return the queues with dead letters and their numbers, or only that of `queue`."""
    name = queue.removeprefix(DLQ_PREFIX)
    if name:
        attached.check_queue(name)
    queues = attached.wait(attached.admin.stats(name))["queues"]
    return [(each["name"], each["dead"]) for each in queues if each["dead"] and name in ("", each["name"])]


def iterate_letters(attached: Attached, queue: str) -> Iterator[dict[str, Any]]:
    """Yield the dead letters of a queue, or of all queues, with bodies; reads a page at a time."""
    for name, dead in queues_with_letters(attached, queue):
        offset = 0
        while offset < dead:
            page = attached.wait(attached.admin.peek(f"{DLQ_PREFIX}{name}", offset, min(PAGE, dead - offset)))
            read = 0
            for letter in page:
                if "body" not in letter:
                    break  # the answer had no room for it: it is the first of the next page
                yield letter
                read += 1
            if not read:
                break
            offset += read


def find_letters(attached: Attached, filters: LetterFilter) -> list[FoundLetter]:
    """Return the selected dead letters. Raises `ClickException` if no instance has ever been of the workflow."""
    found = [found_letter(letter) for letter in iterate_letters(attached, filters.queue) if filters.accepts(letter)]
    if not found:
        check_workflow(attached, filters.workflow)
    return found


def found_letter(letter: Letter) -> FoundLetter:
    """Return a dead letter without its body."""
    return FoundLetter(letter["queue"], letter["id"], _workflow_of(letter), letter["evidence"])


def check_workflow(attached: Attached, workflow: str | None) -> None:
    """Raise `ClickException` if no instance has ever been of the workflow."""
    if workflow is not None and (problem := unknown_workflow(attached, workflow)) is not None:
        raise click.ClickException(problem)


def describe_letters(found: Sequence[FoundLetter]) -> str:
    """Return the number of dead letters with their workflows, as `12 dead letters (orders: 12)`."""
    counts = Counter(letter.workflow_id or "no workflow" for letter in found)
    detail = ", ".join(f"{workflow}: {count:,}" for workflow, count in sorted(counts.items()))
    return pluralize(len(found), "dead letter") + (f" ({detail})" if detail else "")


def requeue_letters(attached: Attached, found: Sequence[FoundLetter]) -> tuple[int, int]:
    """Requeue dead letters; return how many, and how many are evidence."""
    done = 0

    def act(queue: str, ids: list[int]) -> None:
        nonlocal done
        done += attached.wait(attached.admin.requeue(f"{DLQ_PREFIX}{queue}", ids), timeout=60.0)["requeued"]

    _in_slices("requeued", [letter for letter in found if not letter.evidence], act)
    return done, sum(letter.evidence for letter in found)


def purge_letters(attached: Attached, found: Sequence[FoundLetter]) -> tuple[int, int]:
    """Delete dead letters; return how many, and how many instances ended with them."""
    done = gone = 0

    def act(queue: str, ids: list[int]) -> None:
        nonlocal done, gone
        answer = attached.wait(attached.admin.purge(f"{DLQ_PREFIX}{queue}", ids), timeout=60.0)
        done += answer["purged"]
        gone += len(answer["instances"])

    _in_slices("deleted", found, act)
    return done, gone


def _in_slices(label: str, found: Sequence[FoundLetter], act: Callable[[str, list[int]], None]) -> None:
    """Call `act` for slices of the dead letters of each queue; one that has gone since is left out."""
    by_queue: defaultdict[str, list[int]] = defaultdict(list)
    for letter in found:
        by_queue[letter.queue].append(letter.id)
    slices = [(queue, ids[at : at + PAGE]) for queue, ids in by_queue.items() for at in range(0, len(ids), PAGE)]
    begun = 0
    try:
        with Progress(label, len(found)) as progress:
            for queue, ids in slices:
                try:
                    act(queue, ids)
                except Refused:
                    _one_by_one(queue, ids, act)
                begun += len(ids)
                progress.update(begun, f"in {queue}")
    except KeyboardInterrupt:
        click.echo(
            f"interrupted: {begun:,} of {len(found):,} {label}; the same command goes on with the rest", err=True
        )
        raise


def _one_by_one(queue: str, ids: Sequence[int], act: Callable[[str, list[int]], None]) -> None:
    """Act on each dead letter alone: another command has taken one of them since they were found."""
    for id in ids:
        try:
            act(queue, [id])
        except Refused:
            continue


def _workflow_of(letter: Letter) -> str:
    from stageflow_actors.core.envelope import head_of

    head = head_of(letter.get("body") or b"")
    return "" if head is None else head[0]
