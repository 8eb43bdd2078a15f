"""Additions to random plans: stages that ask an endpoint, and messages that expire.

They are drawn from a random source of their own, so that the runs of unchanged plans stay the same. The meaning of a
plan does not change: the endpoint returns the result that the stage would have returned, and fails in the same
attempts. This module inspects no run; the laws of a run are in `laws`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any, Literal, NamedTuple

import constructs_fixtures
from constructs_plans import Choice, Each, Pace, Part, Pause, Place, Plan, Together, handler, options_of, parts_of
from msgspec import structs

from stageflow_actors import Retry, Stage, StageError, Workflow
from stageflow_actors.core.envelope import EMPTY_TRAIL, append_record, decode_outcome, decode_trail, encode
from stageflow_actors.definition.remote import RemoteCall

NOBODY = "nobody"
"""An endpoint that is not served: what is asked of it is never answered."""
PLAIN, PATIENT = "plain", "patient"
"""The endpoints that are: one without a policy, and one that tries again by its own."""
SHORT = 0.05
LONG = 3600.0

How = Literal["remote", "request", "next"]
Trouble = Literal["handler", "endpoint", "reply", "silence"]


class Ask(NamedTuple):
    """What makes a stage ask. `trouble`: where it fails in the attempts in which it does; `stumbles`: how often the
    endpoint tries for nothing at first, each time; `handed_on`: the reply is for the next stage, and no result."""

    how: How
    trouble: Trouble
    endpoint: str
    timeout: float
    stumbles: int
    handed_on: bool


class Wider(NamedTuple):
    """By name of the stage: what it asks, and how long its messages may wait. `patient`: tries again what expired."""

    asks: dict[str, Ask]
    ttls: dict[str, float]
    patient: set[str]


def nothing() -> Wider:
    """Plans as they are."""
    return Wider({}, {}, set())


# drawing


def widen(chance: Random, plan: Plan, wider: Wider, *, asking: bool, waiting: bool, wild: bool) -> Plan:
    """The plan with some of its stages made to ask, or to expire; what they do is added to `wider`.

    What expires would show in a result, so that in a tame run nothing waits for so long.
    """
    for place in plan.places:
        for part in parts_of(place):
            if asking and not isinstance(place, Each) and chance.random() < 0.5:
                handed_on = not isinstance(place, Together) and _is_followed(plan, part.name)
                wider.asks[part.name] = _ask(chance, handed_on, wild)
            if waiting and chance.random() < 0.6:
                wider.ttls[part.name] = chance.choice((0.01, 0.05, 0.3)) if wild else 600.0
                if chance.random() < 0.5 and part.attempts > 1:
                    wider.patient.add(part.name)
    return plan._replace(places=tuple(_as_told(place, wider) for place in plan.places))


def with_uncertain(chance: Random, plan: Plan) -> Plan:
    """The plan with some of its stages undone also where their effect is unknown."""

    def drawn(part: Part) -> Part:
        return part._replace(uncertain=chance.random() < 0.5)

    def changed(place: Place) -> Place:
        if isinstance(place, Part):
            return drawn(place)
        if isinstance(place, Together):
            return place._replace(branches=tuple(map(drawn, place.branches)))
        if isinstance(place, Choice):
            return place._replace(arms={key: tuple(map(drawn, arm)) for key, arm in place.arms.items()})
        return place._replace(stage=drawn(place.stage)) if isinstance(place, Each) else place

    return plan._replace(places=tuple(map(changed, plan.places)))


def _ask(chance: Random, followed: bool, wild: bool) -> Ask:
    how: How = chance.choice(("remote", "request", "request", "next"))
    troubles: dict[How, tuple[Trouble, ...]] = {
        "remote": ("handler", "endpoint", "reply", "silence"),
        "request": ("handler", "endpoint", "silence"),
        "next": ("handler",),
    }
    endpoint = chance.choice((PLAIN, PATIENT))
    stumbles = chance.choice((0, 1)) if endpoint == PATIENT else 0
    timeout = chance.choice((SHORT, 0.3, LONG, LONG)) if wild else LONG
    return Ask(how, chance.choice(troubles[how]), endpoint, timeout, stumbles, followed and how != "remote")


def _as_told(place: Place, wider: Wider) -> Place:
    """The value passed on is not kept as the result of the requesting stage."""

    def told(part: Part) -> Part:
        ask = wider.asks.get(part.name)
        return part._replace(result=None) if ask is not None and ask.handed_on else part

    if isinstance(place, Part):
        return told(place)
    if isinstance(place, Choice):
        return place._replace(arms={key: tuple(map(told, arm)) for key, arm in place.arms.items()})
    return place


def _is_followed(plan: Plan, name: str) -> bool:
    """Whether a stage comes next that can be given something; a delay passes it on."""
    for number, place in enumerate(plan.places):
        if isinstance(place, Choice):
            for arm in place.arms.values():
                if name in [part.name for part in arm[:-1]]:
                    return True
        if name in [part.name for part in parts_of(place)]:
            behind = [one for one in plan.places[number + 1 :] if not isinstance(one, Pause)]
            return bool(behind) and isinstance(behind[0], (Part, Choice, Together))
    raise AssertionError(name)


# the same as code


def widen_workflow(workflow: Workflow[Any], plan: Plan, wider: Wider, each: Mapping[str, Any]) -> None:
    """Give the stages of a workflow what theirs are to have; where some ask, all note what they are given."""
    known = workflow._stages
    asking = any(name in wider.asks for name in known)
    for place in plan.places:
        for part in parts_of(place):
            name = part.name
            if name in wider.asks:
                known[name] = Stage(_asking(part, wider.asks[name]), id=name, **options_of(part), **each)
            elif asking and not isinstance(place, Each):
                known[name] = Stage(_looking(handler(part)), id=name, **options_of(part), **each)
            if name in wider.ttls:
                known[name] = known[name].replace(ttl=wider.ttls[name])
            if name in wider.patient:
                known[name] = known[name].replace(retry=_patient(part.attempts, part.pace))


def endpoints(chance: Random, *, wild: bool) -> list[Stage]:
    """Those that are served."""

    def served(name: str, retry: Retry | None) -> Stage:
        actors, most = chance.randint(1, 2), chance.choice((None, None, 2))
        timeout = chance.choice((None, 0.2)) if wild else None
        return Stage(serve, id=name, actors=actors, max_tasks=most, timeout=timeout, retry=retry)

    return [served(PLAIN, None), served(PATIENT, Retry.fixed(3, 0.01))]


def serve(command: dict[str, Any], ctx: Any) -> Any:
    """An endpoint that acts as its command asks: it records the call, part of it in a step, and answers or fails."""
    asked = f"{command['stage']} at {command['at']}"
    words = (command["stage"], command["attempt"], command["at"], ctx.attempt)
    constructs_fixtures.note(ctx.instance_id, "served", *words)
    ctx.step("once", constructs_fixtures.note, ctx.instance_id, "step", asked)
    constructs_fixtures.note(ctx.instance_id, "kept", asked)
    if ctx.attempt <= command["stumbles"]:
        raise LookupError("stumbled")
    if command["breaks"]:
        raise ValueError(f"{command['stage']} broke in attempt {command['attempt']}")
    return command["answer"]


def _asking(part: Part, ask: Ask) -> Any:
    plain = handler(part._replace(fails=part.fails if ask.trouble == "handler" else 0))

    def handle(context: dict[str, Any], ctx: Any) -> Any:
        _look(context, ctx)
        plain(context, ctx)
        fails = ctx.attempt <= part.fails
        if fails:
            context["left behind"] = ctx.attempt
        mine = [part.name, ctx.instance_id, ctx.attempt]
        answer = mine if ask.handed_on or ask.how == "remote" else part.result
        if ask.how == "next":
            return ctx.request("next", answer)
        command = {
            "stage": part.name,
            "attempt": ctx.attempt,
            "at": time.monotonic(),
            "stumbles": ask.stumbles,
            "breaks": fails and ask.trouble == "endpoint",
            "answer": answer,
        }
        if fails and ask.trouble == "silence":
            return ctx.request(NOBODY, command, timeout=SHORT)
        return ctx.request(ask.endpoint, command, timeout=ask.timeout)

    def take_in(context: dict[str, Any], reply: Any) -> Any:
        name, id, attempt = reply
        constructs_fixtures.note(id, "took in", name, attempt, context[part.name])
        if ask.trouble == "reply" and attempt <= part.fails:
            raise ValueError(f"{part.name} broke in attempt {attempt}")
        return part.result

    return _NotedCall(handle, ask, take_in, part.name) if ask.how == "remote" else handle


class _NotedCall(RemoteCall):
    """A remote stage that receives where it runs."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Callable[..., Any], ask: Ask, take_in: Callable[..., Any], name: str) -> None:
        super().__init__(ask.endpoint, _no_command, take_in, ask.timeout, f"remote stage {name!r}")
        self._handle = handle

    def execute(self, context: Any, ctx: Any) -> Any:
        """As any remote stage, with a command that says for whom it is."""
        return self._handle(context, ctx)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_handle": self._handle}


def _no_command(context: Any) -> Any:
    raise AssertionError("its own handler asks")


def _looking(handle: Callable[..., Any]) -> Any:
    def look_and_handle(context: dict[str, Any], ctx: Any) -> Any:
        _look(context, ctx)
        return handle(context, ctx)

    return look_and_handle


def _look(context: dict[str, Any], ctx: Any) -> None:
    """What it is given, and which attempt at asking for it the context is of."""
    given = ctx.payload
    kept = None if given is None else context.get(given[0])
    constructs_fixtures.note(ctx.instance_id, "given", ctx.stage_id, given, kept)


def _patient(attempts: int, pace: Pace | None) -> Retry:
    """A policy that tries again whatever has happened: a message that expired counts as an error not to be retried."""
    kinds = (Exception, StageError)
    if pace is None:
        return Retry.fixed(attempts, 0, retry_on=kinds)
    if pace.kind == "linear":
        return Retry.linear(attempts, pace.initial, pace.maximum, retry_on=kinds)
    return Retry.exponential(attempts, pace.initial, pace.maximum, jitter=False, retry_on=kinds)


# what must be


def giver(plan: Plan, wider: Wider, name: str, ended: Mapping[str, str]) -> str | None:
    """Which stage's reply a stage is given, by how those before it have ended: the next one behind is, where a stage
    that is skipped, a delay and a branch are none."""
    for other in reversed(_before(plan, name)):
        if other is None:
            return None
        status = ended.get(other)
        if status not in (None, "skipped"):
            ask = wider.asks.get(other)
            return other if ask is not None and ask.handed_on and status in ("completed", "compensated") else None
    return None


def _before(plan: Plan, name: str) -> list[str | None]:
    """The stages on the way to one; None for what passes nothing on."""
    way: list[str | None] = []
    for place in plan.places:
        names = [part.name for part in parts_of(place)]
        if isinstance(place, Choice):
            for arm in place.arms.values():
                is_own_thread = [part.name for part in arm]
                if name in is_own_thread:
                    return [*way, *is_own_thread[: is_own_thread.index(name)]]
            way += names  # those of the arm not taken have no end
        elif name in names:
            return way
        elif isinstance(place, Part):
            way.append(place.name)
        elif isinstance(place, Each):
            way.append(place.stage.name)
        elif not isinstance(place, Pause):
            way.append(None)
    raise AssertionError(name)


def as_plain(outcome: bytes, asks: Iterable[str]) -> bytes:
    """Return the outcome with the failures of requesting stages as if they had worked themselves."""
    names, attempts = set(asks), dict[str, int]()

    def plain(name: str | None, error: str | None) -> str | None:
        if name not in names or error is None:
            return error
        text = re.sub(r"^StageError: endpoint '\w+' answered with an error: ", "", error)
        silence = f"StageTimeout: endpoint '{NOBODY}' did not answer within {SHORT:g} s"
        return f"ValueError: {name} broke in attempt {attempts[str(name)]}" if text == silence else text

    told, trail = decode_outcome(outcome), EMPTY_TRAIL
    for record in decode_trail(told.trail):
        attempts[record.stage_id] = record.attempts
        trail = append_record(trail, structs.replace(record, error=plain(record.stage_id, record.error)))
    return encode(structs.replace(told, trail=trail, error=plain(told.failed_stage, told.error)))


__all__ = ["LONG", "NOBODY", "PATIENT", "PLAIN", "SHORT", "Ask", "Wider", "as_plain", "endpoints", "giver", "nothing"]
__all__ += ["widen", "widen_workflow", "with_uncertain"]
