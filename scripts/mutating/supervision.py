"""Mistakes in the size of pools, the births and exits of workers, and the rows of the history."""

from __future__ import annotations

from mutating.mutant import Mutant

MUTANTS = (
    Mutant(
        "scale-undone-by-a-version",
        "a new version sets the number of actors of a pool back to its definition",
        (
            (
                "stageflow_actors/runtime/node/pool.py",
                "        if self._target_workers == self._spec.actors:\n    ",
                "",
            ),
        ),
        (
            "tests/chaos/test_pool_changes.py::test_a_new_version_with_as_many_actors_leaves_the_number_that_the_pool_was_scaled_to",
        ),
    ),
    Mutant(
        "late-birth-counts-as-missed-exit",
        "the time for which a birth was missed counts for the report of the exit",
        (
            (
                "stageflow_actors/runtime/node/pool.py",
                "worker.pid, worker.pidfd, worker.report_due_since = event.pid, event.pidfd, 0",
                "worker.pid, worker.pidfd = event.pid, event.pidfd",
            ),
        ),
        (
            "tests/chaos/test_pool_changes.py::test_the_zygote_of_a_worker_that_was_born_late_has_time_to_report_its_exit",
        ),
    ),
    Mutant(
        "zygote-stays-awake",
        "a zygote goes on to wait for room in its socket when all reports are sent",
        (
            (
                "stageflow_actors/runtime/zygote/main.py",
                "                os.close(pidfd)\n        self._poller.modify(self._socket.fileno(), select.POLLIN)\n",
                "                os.close(pidfd)\n",
            ),
        ),
        (
            "tests/runtime/zygote/test_zygote_reports.py::test_a_zygote_whose_reports_have_waited_for_room_sleeps_again_when_all_are_sent",
        ),
    ),
    Mutant(
        "unwritten-rows-forgotten",
        "after a smaller write the rows that were left out are forgotten",
        (
            (
                "stageflow_actors/runtime/node/coordinator.py",
                "        del self._pending[: len(batch)]\n",
                "        self._pending.clear()\n",
            ),
        ),
        (
            "tests/history/test_delayed_rows.py::test_after_a_write_that_failed_each_pending_row_is_written_and_acknowledged_once",
        ),
    ),
)
