"""`Selection`: the instances that a command acts on, found by workflow, status and error; its options and questions."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from stageflow_actors.core.plural import pluralize

if TYPE_CHECKING:
    from stageflow_actors.core.description import InstanceDescription
    from stageflow_actors.runtime.client.attach import Attached

__all__ = [
    "LIVE",
    "STATUSES",
    "FoundInstance",
    "Selection",
    "check_may_ask",
    "confirm",
    "described",
    "error_option",
    "filter_options",
    "selection_options",
    "summary",
    "unknown_workflow",
]

F = TypeVar("F", bound=Callable[..., Any])

STATUSES = (
    "pending",
    "running",
    "waiting",
    "compensating",
    "parked",
    "completed",
    "failed",
    "compensated",
    "compensation_failed",
    "cancelled",
)
LIVE = STATUSES[:5]

SEARCHED = 10_000
"""Maximum number of live instances that are searched for the names of workflows."""

PAGE = 100


def error_option(command: F) -> F:
    """`--error SUBSTRING`, as `error: str | None`."""
    return click.option(
        "--error", default=None, metavar="SUBSTRING", help="Only those whose error contains this text.  [default: all]"
    )(command)


def filter_options(command: F) -> F:
    """`--status STATUS`, `--workflow ID` and `--error SUBSTRING`, each of type `str | None`."""
    status = click.option(
        "--status",
        type=click.Choice(STATUSES),
        default=None,
        metavar="STATUS",
        help=f"Only instances of this status: {', '.join(STATUSES)}.  [default: all]",
    )
    workflow = click.option(
        "--workflow", default=None, metavar="ID", help="Only instances of this workflow.  [default: all]"
    )
    return workflow(status(error_option(command)))


def selection_options(command: F) -> F:
    """`--dry-run` and `--yes`, as `dry_run: bool` and `yes: bool`."""
    dry_run = click.option("--dry-run", is_flag=True, help="Only list what is selected, and change nothing.")
    yes = click.option("--yes", is_flag=True, help="Do not ask for confirmation. Needed without a terminal.")
    return dry_run(yes(command))


class FoundInstance(NamedTuple):
    """One selected instance, as the columns of a list name its parts."""

    instance_id: str
    workflow_id: str
    status: str
    stage: str | None
    error: str | None


@dataclass(frozen=True)
class Selection:
    """The instances of a workflow, a status and an error; None selects all."""

    workflow: str | None = None
    status: str | None = None
    error: str | None = None

    def __bool__(self) -> bool:
        return (self.workflow, self.status, self.error) != (None, None, None)

    def find(self, attached: Attached, statuses: Iterable[str]) -> list[FoundInstance]:
        """Return the selected instances that have one of `statuses`, live ones first.

        Raises `ClickException` if there is none, because no instance has ever been of the workflow.
        """
        wanted = set(statuses) if self.status is None else {self.status}
        found: dict[str, FoundInstance] = {}
        live: set[str] = set()
        # Also for finished ones only: an instance that runs again is in the history too.
        live_ids = attached.wait(attached.admin.live_ids(), timeout=30.0)
        for one in described(attached, live_ids, None, None):
            live.add(one.instance_id)
            if one.status in wanted and self.workflow in (None, one.workflow_id) and self._has_error(one.error):
                found[one.instance_id] = FoundInstance(
                    one.instance_id, one.workflow_id, one.status.value, one.stage, one.error
                )
        for status in wanted.difference(LIVE) if attached.history is not None else ():
            assert attached.history is not None
            for row in attached.history.iterate(status, self.workflow):
                if row.instance_id not in live and self._has_error(row.error):
                    found[row.instance_id] = FoundInstance(
                        row.instance_id, row.workflow_id, row.status, row.failed_stage, row.error
                    )
        if not found and self.workflow is not None and (problem := unknown_workflow(attached, self.workflow)):
            raise click.ClickException(problem)
        return list(found.values())

    def _has_error(self, error: str | None) -> bool:
        return self.error is None or self.error in (error or "")


def described(
    attached: Attached, ids: Iterable[str], status: str | None, workflow: str | None
) -> Iterator[InstanceDescription]:
    """Yield the live ones of these instances, of that status and workflow; reads a page at a time."""
    from stageflow_actors.core.description import describe_live

    layout_of = attached.layouts()
    rest = iter(ids)
    while page := [*islice(rest, PAGE)]:
        groups = attached.wait(attached.admin.inspect(page))
        for instance_id in page:
            if instance_id not in groups:
                continue  # it has ended since, and is in the history
            group = groups[instance_id]
            if not all("body" in message for message in group["messages"]):
                # The answer for the page had no room for its bodies.
                group = attached.wait(attached.admin.inspect([instance_id])).get(instance_id, group)
            description = describe_live(group, layout_of)
            if workflow in (None, description.workflow_id) and status in (None, description.status.value):
                yield description


def unknown_workflow(attached: Attached, workflow: str) -> str | None:
    """Return an error if no instance is of this workflow and the cluster has not registered it, else None."""
    from stageflow_actors.core.description import version_of
    from stageflow_actors.definition.guesses import closest

    known = attached.registered_workflows()
    groups = attached.wait(attached.admin.list_groups("", SEARCHED), timeout=30.0)
    known |= {version[0] for version in map(version_of, groups) if version is not None}
    if attached.history is not None:
        known |= attached.history.workflows()
    if workflow in known:
        return None
    meant = closest(workflow, known)
    hint = f" (did you mean {meant!r}?)" if meant else ""
    return f"no instance is of workflow {workflow!r}{hint}: the instances are of {', '.join(sorted(known)) or 'none'}"


def check_may_ask(action: str, yes: bool) -> None:
    """Raise `click.UsageError` without `--yes` and without a terminal on which `confirm` could ask."""
    if not yes and not sys.stdin.isatty():
        raise click.UsageError(f"{action}: without a terminal, confirm with --yes, or look first with --dry-run")


def confirm(action: str, what: str, yes: bool) -> None:
    """Ask on the terminal if `action` may act on `what`. Raises `click.Abort` if not."""
    if not yes:
        click.confirm(f"{action} {what}?", abort=True, err=True)


def summary(found: Iterable[FoundInstance]) -> str:
    """Return the number of instances with their workflows and statuses, as `12 instances (orders: 12 parked)`."""
    rows = list(found)
    counts = Counter((row.workflow_id, row.status) for row in rows)
    parts: dict[str, list[str]] = {}
    for (workflow, status), count in sorted(counts.items()):
        parts.setdefault(workflow or "an unknown workflow", []).append(f"{count:,} {status}")
    detail = "; ".join(f"{workflow}: {', '.join(each)}" for workflow, each in parts.items())
    return pluralize(len(rows), "instance") + (f" ({detail})" if detail else "")
