"""The state from which a retry of a failed instance resumes the failed stage, or the failed compensations.

It is stored in the field `steps` of the envelope and of the outcome: for a stage the values of its completed steps, for
a parallel stage the context before it and the last envelope of each branch, for compensations that failed the completed
steps of each. Pure functions; whether an instance is retried is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from msgspec import Raw

from stageflow_actors.core.envelope import Envelope, decode_envelope, decode_trail, encode
from stageflow_actors.core.merge import merge_fields
from stageflow_actors.core.status import StageStatus

__all__ = [
    "TOO_LARGE",
    "completed_branch",
    "limit_steps",
    "pack_steps",
    "resume_branches",
    "save_branches",
    "steps_of_branch",
    "unpack_steps",
]

Steps = Mapping[str, bytes]

_BEFORE = ":before"
_ENDED = ":ended:"
_STEP = ":step:"

_decode_steps = msgspec.msgpack.Decoder(dict[str, bytes]).decode

TOO_LARGE = ":too-large"
"""Key that replaces all steps if they exceed the size limit of a message."""


def limit_steps(steps: dict[str, bytes] | None, limit: int) -> dict[str, bytes] | None:
    """Return `steps`, or only the key `TOO_LARGE` if their values exceed `limit` bytes in total."""
    if steps and sum(map(len, steps.values())) > limit:
        return {TOO_LARGE: b""}
    return steps


def save_branches(before: Raw, arrivals: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    """Return the resume state of a parallel stage: the context `before` it, and the last envelope of each branch."""
    return {_BEFORE: bytes(before), **{f"{_ENDED}{slot}": bytes(body) for slot, body in arrivals}}


def resume_branches(kept: Steps, given: Raw | None) -> tuple[Raw, dict[str, bytes]] | None:
    """Return the context for the branches that run again, and the state of each branch.

    If the user has `given` another context, the changes of the completed branches are merged into it. Return None if
    `kept` holds no state of a parallel stage.
    """
    if _BEFORE not in kept:
        return None
    before = Raw(kept[_BEFORE])
    branches: dict[str, bytes] = {}
    for key, body in kept.items():
        if not key.startswith(_ENDED):
            continue
        branch = decode_envelope(body)
        if _failed(branch):
            prefix = f"{_STEP}{key.removeprefix(_ENDED)}:"
            branches.update({f"{prefix}{name}": value for name, value in (branch.steps or {}).items()})
            continue
        branch.steps = None
        if given is not None:
            # If both changed a field, the branch wins: its effects have happened.
            branch.context, _ = merge_fields(before, {"branch": branch.context, "given": given})
        branches[key] = encode(branch)
    return (before if given is None else given), branches


def pack_steps(steps: Mapping[str, dict[str, bytes]] | None) -> dict[str, bytes] | None:
    """Return the steps of failed compensations, by stage id, as one mapping."""
    return {stage_id: encode(own) for stage_id, own in steps.items()} if steps else None


def unpack_steps(packed: Steps | None) -> dict[str, dict[str, bytes]] | None:
    """Return the steps of failed compensations by stage id; the reverse of `pack_steps`."""
    return None if packed is None else {stage_id: _decode_steps(own) for stage_id, own in packed.items()}


def completed_branch(branches: Steps, name: str) -> bytes | None:
    """Return the last envelope of a branch that does not run again, or None."""
    return branches.get(f"{_ENDED}{name}")


def steps_of_branch(branches: Steps, name: str) -> dict[str, bytes] | None:
    """Return the steps that a failed branch had completed, or None."""
    prefix = f"{_STEP}{name}:"
    own = {key.removeprefix(prefix): value for key, value in branches.items() if key.startswith(prefix)}
    return own or None


def _failed(branch: Envelope) -> bool:
    trail = decode_trail(branch.trail)
    return not trail or trail[-1].status == StageStatus.failed
