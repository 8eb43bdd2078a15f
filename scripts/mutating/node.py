"""Mistakes in the node and the zygote: pools, exits, the coordinator, the history."""

from __future__ import annotations

from mutating.mutant import Mutant

MUTANTS = (
    Mutant(
        "blocked-loop-charges-all",
        "each message that is late behind a blocked event loop is charged with its timeout",
        (
            (
                "stageflow_actors/runtime/node/exit_policy.py",
                "        late = [state for state in late if state in blocking or state.is_overdue(began)]\n",
                "        del began\n",
            ),
        ),
        ("tests/chaos/test_exit_policy.py::test_a_lane_that_blocks_the_event_loop_is_late_alone",),
    ),
    Mutant(
        "id-leaves-before-history",
        "the broker forgets an instance before its row is durable",
        (
            (
                "stageflow_actors/runtime/node/coordinator.py",
                "        try:\n            self._history.write(rows, self._tracebacks)\n",
                (
                    "        acks: list[Ack] = [(i.id, i.lease, FLAG_CLOSE_GROUP, i.group) for i, _ in batch]\n"
                    "        self._broker.settle([], [], acks, [], [])\n"
                    "        try:\n            self._history.write(rows, self._tracebacks)\n"
                ),
            ),
        ),
        (
            "tests/simulator/test_simulator.py::test_whatever_breaks_each_instance_ends_exactly_as_its_workflow_requires[0]",
        ),
    ),
    Mutant(
        "retiring-by-kill",
        "a worker that is no longer needed is killed in the middle of its work",
        (
            (
                "stageflow_actors/runtime/node/pool.py",
                "        self._context.broker.admin.retire(worker.peer).add_done_callback(on_answer)\n",
                (
                    "        if worker.pidfd >= 0 and not any(lane.is_busy for lane in worker.lanes):\n"
                    "            worker.killed = ((), Failure('stopped', 'not needed'))\n"
                    "            kill_group(worker.pid, worker.pidfd)\n"
                ),
            ),
        ),
        (
            "tests/runtime/test_retiring_workers.py::test_a_pool_that_grows_and_shrinks_under_load_repeats_nothing[plain]",
        ),
    ),
    Mutant(
        "recycled-taken-for-dead",
        "a recycled worker is charged like one that died",
        (
            (
                "stageflow_actors/runtime/node/exit_policy.py",
                "is_end = status is None or (status == EXIT_RECYCLED and (started or ready))",
                "is_end = status is None",
            ),
        ),
        (
            "tests/chaos/test_exit_policy.py::test_an_end_that_was_to_come_is_nobodys_fault_and_is_not_counted[recycled]",
            "tests/simulator/test_named_seeds.py::test_a_bug_found_once_is_not_found_again[recycled]",
        ),
    ),
    Mutant(
        "outdated-history-taken",
        "a history that lacks rows which the journal records as written counts as complete",
        (("stageflow_actors/runtime/node/history_consistency.py", "history.written < int(recorded)", "False"),),
        ("tests/runtime/test_history_consistency.py::test_a_history_older_than_the_journal_is_refused",),
    ),
    Mutant(
        "finished-run-again",
        "an instance that finished by a newer history is run again by an older journal",
        (("stageflow_actors/runtime/node/history_consistency.py", "admin.forget_groups(ended).result()", "pass"),),
        (
            "tests/runtime/test_history_consistency.py::test_of_a_journal_older_than_the_history_what_has_finished_is_forgotten",
        ),
    ),
    Mutant(
        "compensation-cancelled",
        "a compensation is ended when its instance is cancelled",
        (("stageflow_actors/runtime/node/pool.py", ' and self._spec.kind != "compensation":', ":"),),
        (
            "tests/chaos/test_pool_deaths.py::test_a_stage_in_work_is_notified_of_its_cancellation_and_a_compensation_is_not",
        ),
    ),
    Mutant(
        "dead-killed-once-more",
        "a dead worker is killed and classified by the message that it seems to run",
        (
            (
                "stageflow_actors/runtime/node/pool.py",
                "        if self._context.has_exited(worker.pidfd):\n            return  # its",
                "        if False:\n            return  # its",
            ),
        ),
        ("tests/chaos/test_pool_deaths.py::test_a_worker_that_has_died_is_not_killed_for_what_it_seems_to_run_still",),
    ),
    Mutant(
        "ending-worker-charged",
        "the last message is responsible for a crash while its worker ends",
        (
            (
                "stageflow_actors/runtime/node/exit_policy.py",
                "if expected or (ending and ready):",
                "if expected:",
            ),
        ),
        (
            (
                "tests/chaos/test_exit_policy.py"
                "::test_however_a_worker_exits_that_was_ending_nothing_is_charged[a crash of a C library-states0]"
            ),
        ),
    ),
    Mutant(
        "trackers-killed",
        "processes that a worker has left behind are killed before they have cleaned up",
        (
            (
                "stageflow_actors/runtime/zygote/main.py",
                "self._slots[worker.slot].ending_since_ns:",
                "False:",
            ),
        ),
        ("tests/runtime/test_worker_exit.py::test_what_handlers_have_begun_is_whole[child_that_cleans_up-stopped]",),
    ),
    Mutant(
        "back-off-never-reset",
        "a pool that could not start once waits longer each time, whatever its workers have done since",
        (
            (
                "stageflow_actors/runtime/node/start_back_off.py",
                "started_at >= self.failed_at and (settled or now - started_at >= LIVED_SECONDS)",
                "started_at >= self.failed_at and not settled and now < 0",
            ),
        ),
        (
            "tests/chaos/test_pool_deaths.py::test_a_settled_message_makes_the_next_failed_start_the_first_one_again",
            "tests/chaos/test_pool_deaths.py::test_a_worker_that_has_lived_for_a_minute_does",
        ),
    ),
    Mutant(
        "no-back-off",
        "workers that cannot start are tried again at once",
        (
            (
                "stageflow_actors/runtime/node/start_back_off.py",
                "self.not_before = now + min(MAX_DELAY_SECONDS",
                "self.not_before = now + min(0.0",
            ),
        ),
        (
            (
                "tests/chaos/test_pool_deaths.py"
                "::test_a_worker_that_cannot_start_is_tried_again_after_a_tenth_of_a_second_doubling_to_thirty"
            ),
            "tests/simulator/test_named_seeds.py::test_workers_that_cannot_start_are_tried_again_later_each_time",
        ),
    ),
    Mutant(
        "failing-not-reported",
        "a pool whose workers cannot start is not reported to the broker, so the reason of a wait cannot be read",
        (
            (
                "stageflow_actors/runtime/node/start_causes.py",
                "                self._broker.admin.report_starts([state])\n",
                "                pass\n",
            ),
        ),
        (
            "tests/chaos/test_pool_deaths.py::test_a_pool_is_failing_while_no_worker_is_ready_and_also_during_a_try",
            "tests/simulator/test_named_seeds.py::test_workers_that_cannot_start_are_tried_again_later_each_time",
        ),
    ),
    Mutant(
        "old-workers-hide-failing-starts",
        "a message that an old worker settles resets the back-off of new ones that cannot start",
        (
            (
                "stageflow_actors/runtime/node/start_back_off.py",
                "if self.failures and started_at >= self.failed_at and (settled",
                "if self.failures and (settled",
            ),
        ),
        (
            "tests/chaos/test_pool_deaths.py::test_old_workers_that_settle_messages_do_not_hide_that_new_ones_cannot_start",
        ),
    ),
)
