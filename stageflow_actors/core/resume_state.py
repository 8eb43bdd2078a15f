"""What a retry goes on from: how far the stage that failed had come.

Kept as steps are, in the envelope of the failure and in the outcome: of a stage its own steps, of a parallel stage the
context before it and how each branch ended. Pure; nothing here decides whether something is retried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Raw

from stageflow_actors.core.envelope import Envelope, decode_envelope, decode_trail, encode
from stageflow_actors.core.merge import merge_fields
from stageflow_actors.core.status import StageStatus

__all__ = ["TOO_LARGE", "completed_branch", "limit_steps", "resume_branches", "save_branches", "steps_of_branch"]

Steps = Mapping[str, bytes]

_BEFORE = ":before"
_ENDED = ":ended:"
_STEP = ":step:"

TOO_LARGE = ":too-large"
"""In place of all that would have been kept: it is more than a message may be."""


def limit_steps(steps: dict[str, bytes] | None, limit: int) -> dict[str, bytes] | None:
    """`steps`, if they are not larger than `limit` bytes in all."""
    if steps and sum(map(len, steps.values())) > limit:
        return {TOO_LARGE: b""}
    return steps


def save_branches(before: Raw, arrivals: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    """What is to be kept of a parallel stage: the context before it, and the envelopes that its branches ended with."""
    return {_BEFORE: bytes(before), **{f"{_ENDED}{slot}": bytes(body) for slot, body in arrivals}}


def resume_branches(kept: Steps, given: Raw | None) -> tuple[Raw, dict[str, bytes]] | None:
    """The context with which the branches that did not complete begin once more, and all that is known of each.

    With another context `given`, what the others changed is changed in that. None where nothing was kept.
    """
    if _BEFORE not in kept:
        return None
    before = Raw(kept[_BEFORE])
    taken: dict[str, bytes] = {}
    for key, body in kept.items():
        if not key.startswith(_ENDED):
            continue
        branch = decode_envelope(body)
        if _failed(branch):
            prefix = f"{_STEP}{key.removeprefix(_ENDED)}:"
            taken.update({f"{prefix}{name}": value for name, value in (branch.steps or {}).items()})
            continue
        branch.steps = None
        if given is not None:
            # Of what both have changed that of the branch counts: it has been done.
            branch.context, _ = merge_fields(before, {"branch": branch.context, "given": given})
        taken[key] = encode(branch)
    return (before if given is None else given), taken


def completed_branch(taken: Steps, name: str) -> bytes | None:
    """The envelope of a branch that need not run again."""
    return taken.get(f"{_ENDED}{name}")


def steps_of_branch(taken: Steps, name: str) -> dict[str, bytes] | None:
    """The steps that a branch had completed before it failed."""
    prefix = f"{_STEP}{name}:"
    own = {key.removeprefix(prefix): value for key, value in taken.items() if key.startswith(prefix)}
    return own or None


def _failed(branch: Envelope) -> bool:
    trail = decode_trail(branch.trail)
    return not trail or trail[-1].status == StageStatus.failed
