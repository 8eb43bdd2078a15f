"""A pool whose number of actors, version or zygote changes: how many workers it has afterwards, and of which zygote."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from stageflow_actors.runtime.ipc.exit_codes import EXIT_RECYCLED
from stageflow_actors.runtime.ipc.pool_spec import VersionCode
from stageflow_actors.runtime.node.pool import UNREPORTED_NS, Tick
from stageflow_actors.runtime.node.pool_events import ReplaceSpec, ScaleTo


def test_a_new_version_with_as_many_actors_leaves_the_number_that_the_pool_was_scaled_to(nursery: Any) -> None:
    made = nursery(actors=1)
    made.pool.on_start()
    made.birth()
    made.pool.on_receive(ScaleTo("q", 3))
    old = list(made.zygote.asked)
    assert len(old) == 3
    for id in old[1:]:
        made.birth(id)
    spec = made.pool._spec
    newer = structs.replace(spec, programs=[*spec.programs, VersionCode(2, b"", spec.programs[0].plan)])
    made.pool.on_receive(ReplaceSpec(newer))
    for id in old:
        made.lane(id).mark_ready()
        made.end(id, EXIT_RECYCLED)
    assert len(made.zygote.asked) == 3 + 3, "one for each that has retired"


def test_a_new_version_with_more_actors_changes_the_number_of_a_pool_that_was_not_scaled(nursery: Any) -> None:
    made = nursery(actors=1)
    made.pool.on_start()
    made.pool.on_receive(ReplaceSpec(structs.replace(made.pool._spec, actors=2)))
    assert len(made.zygote.asked) == 2


def test_the_zygote_of_a_worker_that_was_born_late_has_time_to_report_its_exit(nursery: Any) -> None:
    made = nursery(actors=1)
    made.pool.on_start()
    made.pool.on_receive(Tick())
    (id,) = made.zygote.asked
    assert made.worker(id).report_due_since > 0, "the zygote owes the report of the start"
    made.worker(id).report_due_since -= 100 * UNREPORTED_NS
    made.birth(id)
    made.exited.add(made.worker(id).pidfd)  # the exit is seen before the zygote has reported it
    made.zygote.stopped = True
    made.pool._next_exit_check = 0
    made.pool.on_receive(Tick())
    assert not made.zygote.killed
    made.worker(id).report_due_since -= UNREPORTED_NS + 1
    made.pool._next_exit_check = 0
    made.pool.on_receive(Tick())
    assert made.zygote.killed, "it is stopped, and owes this report for too long"
