"""Expense reports that people have to approve: a state machine whose events are signals and clocks.

    python examples/approval.py

The amount decides how many people must approve. A refusal ends the workflow, and the reserved budget is released. If an
approver does not answer in time, the report escalates to the next level; without a next level it is refused. A waiting
report occupies no process, survives restarts, and accepts a decision that arrives before it is requested. One table
lists the legal transitions, and every change of state goes through it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import click

from stageflow_actors import Runtime, StageError, Workflow


class State(StrEnum):
    DRAFT = "draft"
    WAITING = "waiting"
    APPROVED = "approved"
    PAID = "paid"
    REFUSED = "refused"


class Event(StrEnum):
    SUBMIT = "submit"
    YES = "yes"
    LAST_YES = "last yes"
    NO = "no"
    SILENCE = "silence"
    LAST_SILENCE = "last silence"
    PAY = "pay"
    UNDO = "undo"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.DRAFT, Event.SUBMIT): State.WAITING,
    (State.WAITING, Event.YES): State.WAITING,
    (State.WAITING, Event.SILENCE): State.WAITING,
    (State.WAITING, Event.LAST_YES): State.APPROVED,
    (State.WAITING, Event.NO): State.REFUSED,
    (State.WAITING, Event.LAST_SILENCE): State.REFUSED,
    (State.WAITING, Event.UNDO): State.REFUSED,
    (State.APPROVED, Event.PAY): State.PAID,
    (State.APPROVED, Event.UNDO): State.REFUSED,
}

LEVELS = (("lead", 0), ("head", 500), ("finance", 5_000))
"""The approvers, and the amount above which each of them must approve."""


class IllegalTransition(Exception):
    """The table has no such transition; the report is unchanged."""


@dataclass
class Report:
    """An expense report and its history: the context of the workflow. `amount` in whole euros."""

    report_id: str
    employee: str
    amount: int
    purpose: str
    state: State = State.DRAFT
    reserved: int = 0
    history: list[str] = field(default_factory=list)

    def validate(self) -> None:
        if self.amount <= 0:
            raise ValueError(f"the amount of an expense must be more than 0, not {self.amount}")

    def apply(self, event: Event, note: str) -> None:
        """Change the state by the table; the only way to change `state`."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise IllegalTransition(f"{self.report_id} is {self.state}, and {event!r} is not allowed there")
        self.state = following
        self.history.append(note)


def levels_of(amount: int) -> tuple[str, ...]:
    """Return the levels that must approve, lowest first."""
    return tuple(name for name, floor in LEVELS if amount > floor)


def reserve_budget(report: Report) -> None:
    report.reserved = report.amount
    report.apply(Event.SUBMIT, f"submitted by {report.employee}")


def release_budget(report: Report, ctx: Any) -> None:
    report.reserved = 0
    report.apply(Event.UNDO, f"refused: {ctx.error}")


def pay(report: Report) -> None:
    report.reserved = 0
    report.apply(Event.PAY, "paid")


def approval(levels: tuple[str, ...], patience: float) -> Workflow[Report]:
    """Return the workflow for these levels, one after the other, each with `patience` seconds to answer."""
    workflow = Workflow("approval-by-" + "-".join(levels), context=Report)
    workflow.add_stage(reserve_budget, compensation=release_budget)
    for level in levels:
        last = level == levels[-1]
        workflow.add_signal(level, timeout=patience, on_signal=decision(level, last), on_timeout=silence(level, last))
    return workflow.add_stage(pay)


def decision(level: str, last: bool) -> Any:
    def decided(report: Report, payload: dict[str, Any]) -> None:
        by = f"{payload['by']} ({level})"
        if not payload["approve"]:
            raise StageError(f"{by} refused: {payload.get('reason', 'no reason given')}")
        report.apply(Event.LAST_YES if last else Event.YES, f"approved by {by}")

    return decided


def silence(level: str, last: bool) -> Any:
    def waited(report: Report) -> None:
        if last:
            raise StageError(f"the {level} did not answer in time, and there is no higher level")
        report.apply(Event.SILENCE, f"the {level} did not answer in time: escalated")

    return waited


SCRIPT: list[tuple[Report, dict[str, dict[str, Any]]]] = [
    (Report("R-1", "Ida", 120, "train to Hamburg"), {"lead": {"by": "Ada", "approve": True}}),
    (Report("R-2", "Emil", 2_400, "a laptop"), {"head": {"by": "Grace", "approve": True}}),  # the lead is on holiday
    (
        Report("R-3", "Lea", 9_000, "a sauna"),
        {
            "lead": {"by": "Ada", "approve": True},
            "head": {"by": "Grace", "approve": True},
            "finance": {"by": "Katherine", "approve": False, "reason": "not this year"},
        },
    ),
    (Report("R-4", "Noah", 80, "a dinner"), {}),  # no answer
]
"""The reports, and the decisions on them."""


@click.command()
@click.option("--patience", default=1.0, show_default=True, help="Seconds that each approver has to answer.")
def main(patience: float) -> None:
    """Run four expense reports through their approvals: approved, escalated, refused, unanswered."""
    chains = {levels: approval(levels, patience) for levels in {levels_of(report.amount) for report, _ in SCRIPT}}
    with tempfile.TemporaryDirectory() as folder, Runtime(*chains.values(), data_dir=folder) as runtime:
        instances = []
        for report, decisions in SCRIPT:
            chain = chains[levels_of(report.amount)]
            instance = runtime.submit(chain, report, instance_id=report.report_id)
            for level, answer in decisions.items():
                instance.signal(level, answer)  # kept until the report waits for it
            instances.append(instance)
        for instance in instances:
            result = instance.result()
            final = result.context
            assert final is not None
            click.echo(f"{final.report_id}  {final.employee}, {final.amount}: {final.purpose}  -> {final.state}")
            for line in final.history:
                click.echo(f"       {line}")


if __name__ == "__main__":
    main()
