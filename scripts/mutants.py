#!/usr/bin/env python3
"""Plant mistakes and show which named test kills each.

Each mutant is a plausible mistake of a broker, a journal or a saga runtime,
planted into a copy of the code. It dies when each test named beside it fails:
a test that nothing can fail proves nothing. The working tree is only read.

    ./scripts/prove mutants           # all of them: some minutes
    ./scripts/prove mutants no-fence  # one
    ./scripts/prove mutants --list
    ./scripts/prove mutants --check   # only check that each can be planted
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from argument_types import script_parser

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("brokers", "stageflow_actors", "tests", "examples", "scripts", "pyproject.toml", "README.md")
LIMIT_SECONDS = 300.0


class Mutant(NamedTuple):
    """`edits` are (file, text, replacement), each text found exactly once; `killers` are test ids."""

    name: str
    mistake: str
    edits: tuple[tuple[str, str, str], ...]
    killers: tuple[str, ...]


MUTANTS = (
    Mutant(
        "dispatch-before-fsync",
        "the decisions of a round leave before they are on disk",
        (
            (
                "brokers/stageflow_brokers/engine/engine.py",
                "        written = self._commit()\n",
                "        early = machine.dispatch()\n        written = self._commit()\n",
            ),
            (
                "brokers/stageflow_brokers/engine/engine.py",
                "        return machine.dispatch()\n",
                "        return early\n",
            ),
        ),
        ("tests/brokers/test_commit_before_effect.py::test_a_confirmation_and_a_delivery_leave_after_their_sync",),
    ),
    Mutant(
        "context-not-copied",
        "all messages of a worker are handled in one context of variables",
        (
            (
                "stageflow_actors/runtime/worker/executors/base.py",
                "return self._copy_context().run(self._run, item, body)",
                "return self._run(item, body)",
            ),
        ),
        ("tests/runtime/test_isolated_messages.py::test_no_message_in_this_process_leaves_anything_behind[attempts]",),
    ),
    Mutant(
        "decimal-context-shared",
        "the copies of the context variables share the context of decimal",
        (
            (
                "stageflow_actors/runtime/worker/base_context.py",
                "        copied.run(decimal.setcontext, self._decimal.copy())\n",
                "",
            ),
        ),
        (
            "tests/runtime/test_isolated_messages.py::test_a_copy_holds_what_was_set_before_it_and_no_copy_holds_what_was_set_in_another",
        ),
    ),
    Mutant(
        "slot-names-only-the-first",
        "a slot names the coroutine that began, and not the one that is resumed",
        (
            (
                "stageflow_actors/runtime/worker/event_loop.py",
                "coroutine if call is None else _Turns(coroutine, call)",
                "coroutine",
            ),
        ),
        ("tests/runtime/test_event_loop.py::test_each_resumption_is_a_turn_of_its_message_and_of_no_other[twice]",),
    ),
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
        "no-fence",
        "a settlement counts whatever lease it names",
        (
            (
                "brokers/stageflow_brokers/core/settle.py",
                "if message is None or message.lease != lease:",
                "if message is None:",
            ),
            (
                "brokers/stageflow_brokers/core/leases.py",
                "if message is None or message.lease != lease:",
                "if message is None:",
            ),
        ),
        (
            "tests/brokers/test_contract.py::TestBrokers::test_an_old_lease_is_refused_though_its_holder_has_the_message_again[memory]",
        ),
    ),
    Mutant(
        "no-directory-fsync",
        "a new segment's name is not made durable",
        (
            (
                "brokers/stageflow_brokers/journal/segment_allocator.py",
                (
                    "            files.rename(source, self._directory / file_name(number))\n"
                    "            files.fsync_dir(self._directory)\n"
                ),
                "            files.rename(source, self._directory / file_name(number))\n",
            ),
        ),
        ("tests/journal/test_journal_faults.py::test_a_machine_that_stops_at_any_call_loses_nothing_acknowledged",),
    ),
    Mutant(
        "segment-out-of-order",
        "the newest sealed segment is deleted instead of the oldest",
        (
            (
                "brokers/stageflow_brokers/journal/journal.py",
                "        oldest = self._sealed[0]\n",
                "        oldest = self._sealed[-1]\n",
            ),
            (
                "brokers/stageflow_brokers/journal/journal.py",
                "        del self._sealed[0]\n",
                "        del self._sealed[-1]\n",
            ),
        ),
        ("tests/journal/test_journal_commit.py::test_only_the_oldest_sealed_segment_can_be_dropped",),
    ),
    Mutant(
        "segment-not-copied-forward",
        "a segment is deleted although messages in it are live",
        (
            (
                "brokers/stageflow_brokers/engine/compaction.py",
                "        if self._machine.writer.copy_live(",
                "        if False and self._machine.writer.copy_live(",
            ),
        ),
        (
            "tests/brokers/test_compaction.py::test_the_journal_of_a_steady_state_does_not_grow_whatever_lives_long_in_it",
        ),
    ),
    Mutant(
        "join-counts-duplicates",
        "an arrival sent twice fills two slots of a join",
        (
            (
                "brokers/stageflow_brokers/core/gather.py",
                "        if slot in self.seen:\n            return False\n",
                "",
            ),
            (
                "brokers/stageflow_brokers/core/gather.py",
                "self.arrivals[slot] = body",
                'self.arrivals[f"{slot}{len(self.arrivals)}"] = body',
            ),
        ),
        ("tests/brokers/test_contract.py::TestBrokers::test_a_slot_counts_once[memory]",),
    ),
    Mutant(
        "compensation-by-index",
        "all stages before the failed one are compensated, completed or not",
        (
            (
                "stageflow_actors/core/routing.py",
                "for stage_id in reversed(completed_stages(envelope.trail)))\n",
                "for stage_id in [stage.id for stage in reversed(plan.stages)])\n",
            ),
        ),
        ("tests/core/test_routing.py::test_compensation_by_index_would_undo_what_never_happened",),
    ),
    Mutant(
        "failed-fsync-ignored",
        "an error of fdatasync is ignored",
        (
            (
                "brokers/stageflow_brokers/journal/journal.py",
                "                self._files.fdatasync(self._fd)\n",
                (
                    "                try:\n                    self._files.fdatasync(self._fd)\n"
                    "                except OSError:\n                    pass\n"
                ),
            ),
        ),
        (
            "tests/journal/test_journal_faults.py::test_after_a_failed_commit_no_commit_succeeds_though_the_disk_works_again[fdatasync]",
        ),
    ),
    Mutant(
        "epoch-not-durable",
        "a broker that starts does not record its new epoch",
        (("brokers/stageflow_brokers/core/machine.py", "        self.writer.record_epoch()\n", ""),),
        ("tests/brokers/test_broker_killed.py::test_whatever_was_in_the_broker_is_in_it_again",),
    ),
    Mutant(
        "roster-not-awaited",
        "after a restart queues open before the workers have reported their leases",
        (("brokers/stageflow_brokers/core/machine.py", "workers_known=not supervised,", "workers_known=True,"),),
        ("tests/brokers/test_contract.py::TestBrokers::test_nothing_is_delivered_before_the_roster_is_known[memory]",),
    ),
    Mutant(
        "frames-taken-twice",
        "a frame that was sent again is accepted again",
        (
            (
                "brokers/stageflow_brokers/core/machine.py",
                "        if frame <= session.highest_frame:\n            return DUPLICATE\n",
                "",
            ),
        ),
        ("tests/brokers/test_replay_accidents.py::test_an_answer_that_was_lost_is_sent_again_within_an_epoch",),
    ),
    Mutant(
        "step-not-kept",
        "a step is confirmed and never recorded",
        (
            (
                "brokers/stageflow_brokers/core/settle.py",
                "        self._writer.record(records.CHECKPOINT_FRAME, session.peer, header, blob)\n",
                "",
            ),
        ),
        ("tests/brokers/test_broker_killed.py::test_a_step_that_was_confirmed_is_there_after_a_restart",),
    ),
    Mutant(
        "id-leaves-before-history",
        "the broker forgets an instance before its row is durable",
        (
            (
                "stageflow_actors/runtime/node/coordinator.py",
                "        try:\n            self._history.write(rows)\n",
                (
                    "        acks: list[Ack] = [(i.id, i.lease, FLAG_CLOSE_GROUP, i.group) for i, _ in batch]\n"
                    "        self._broker.settle([], [], acks, [], [])\n"
                    "        try:\n            self._history.write(rows)\n"
                ),
            ),
        ),
        (
            "tests/simulator/test_simulator.py::test_whatever_breaks_each_instance_ends_exactly_as_its_workflow_requires[0]",
        ),
    ),
    Mutant(
        "failed-stage-undone",
        "a failed stage counts as completed for compensation",
        (
            (
                "stageflow_actors/core/routing.py",
                "        if record.status == StageStatus.completed:\n            found[",
                "        if True:\n            found[",
            ),
        ),
        ("tests/core/test_routing.py::test_completed_stages_are_those_in_the_trail_that_completed_in_that_order",),
    ),
    Mutant(
        "failed-compensation-hidden",
        "an instance has the status compensated although a compensation failed",
        (
            (
                "stageflow_actors/core/routing.py",
                "    failed = any(done.status == StageStatus.failed for done in task.done)\n",
                "    failed = False\n",
            ),
        ),
        ("tests/core/test_routing.py::test_the_end_names_each_compensation_and_never_hides_one_that_failed",),
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
                "(status in (None, EXIT_RECYCLED) and",
                "(status is None and",
            ),
        ),
        (
            "tests/runtime/test_retiring_workers.py::test_a_recycled_worker_whose_messages_had_all_failed_does_not_count_as_dead",
            "tests/simulator/test_named_seeds.py::test_a_bug_found_once_is_not_found_again[recycled]",
        ),
    ),
    Mutant(
        "unmet-in-the-first-attempt",
        "a stage with unmet dependencies is reported with one attempt, whatever the number",
        (
            (
                "stageflow_actors/runtime/worker/executors/base.py",
                "self._fail_stage(item, envelope, failure, attempt, self._wall(), 0.0)",
                "self._fail_stage(item, envelope, failure, 1, self._wall(), 0.0)",
            ),
        ),
        ("tests/simulator/test_named_seeds.py::test_a_bug_found_once_is_not_found_again[unmet]",),
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
        "request-waits-for-ever",
        "a request without a worker outlives its timeout, and its instance is not reported as parked",
        (
            (
                "stageflow_actors/runtime/worker/executors/stage.py",
                "request.endpoint, sent, ttl=request.timeout)",
                "request.endpoint, sent)",
            ),
        ),
        (
            "tests/constructs/test_parking_requests.py::test_a_waiting_caller_is_notified_of_an_instance_parked_for_lack_of_an_endpoint",
            "tests/simulator/test_named_seeds.py::test_a_bug_found_once_is_not_found_again[parked-while-asked]",
        ),
    ),
    Mutant(
        "marked-before-counted",
        "a crash between the mark of a message to be parked and its parking counts as a requeue",
        (
            (
                "stageflow_actors/runtime/worker/executors/stage.py",
                "            if not marked:\n                return self._retry(item, 0.0, failure)\n",
                (
                    "            if not marked:\n"
                    '                self._store(item).keep(PARK_MARK, b"")\n'
                    "                return self._park(item, failure)\n"
                ),
            ),
        ),
        ("tests/constructs/test_parking_requests.py::test_a_crash_before_the_parking_is_no_requeue",),
    ),
    Mutant(
        "greeting-taken-twice",
        "a hello that arrives twice takes back later deliveries",
        (("brokers/stageflow_brokers/core/machine.py", "elif hello.number <= session.hello_number:", "elif False:"),),
        (
            "tests/brokers/test_connection_accidents.py::test_a_hello_that_arrives_twice_takes_nothing_back",
            "tests/simulator/test_named_seeds.py::test_a_bug_found_once_is_not_found_again[greeting-twice]",
        ),
    ),
    Mutant(
        "answer-with-welcome-lost",
        "an answer that comes with the welcome is dropped",
        (
            (
                "brokers/stageflow_brokers/client/connection.py",
                "                        self._handle_notice(other, more)\n                return True\n",
                (
                    "                        self._handle_notice(other, more)\n"
                    "                out.acked = -1\n                return True\n"
                ),
            ),
        ),
        ("tests/brokers/test_connection_accidents.py::test_an_answer_that_comes_with_the_welcome_counts",),
    ),
    Mutant(
        "greeting-for-each-frame",
        "a peer sends hello again for each frame that it sent before its hello",
        (
            (
                "brokers/stageflow_brokers/client/connection.py",
                "            # A `hello` notice answers frames sent before our hello, so it needs no second hello.\n",
                '            if word == "hello":\n                self.send_hello()\n                return False\n',
            ),
        ),
        (
            (
                "tests/brokers/test_connection_accidents.py"
                "::test_a_peer_that_has_greeted_does_not_greet_again_for_each_frame_it_sent_before"
            ),
        ),
    ),
    Mutant(
        "not-watched-again",
        "a start that is sent again is answered, and its end never sent",
        (
            (
                "brokers/stageflow_brokers/core/machine.py",
                "                self.publish_handler.watch_groups(session, frame)\n",
                "                pass\n",
            ),
        ),
        (
            "tests/brokers/test_connection_accidents.py::test_how_an_instance_ended_is_sent_again_when_that_was_lost_with_the_session[True]",
        ),
    ),
    Mutant(
        "epoch-lost-with-its-segment",
        "the epoch is not recorded again before its segment is deleted",
        (
            (
                "brokers/stageflow_brokers/core/record_writer.py",
                "list(frames.items())))\n        self.record_epoch()\n",
                "list(frames.items())))\n",
            ),
        ),
        ("tests/brokers/test_compaction.py::test_epoch_and_frames_outlive_the_segments_that_recorded_them",),
    ),
    Mutant(
        "frames-lost-with-their-segment",
        "the last frame of a peer is not recorded again before its segment is deleted",
        (
            (
                "brokers/stageflow_brokers/core/record_writer.py",
                "        self.record(records.SESSIONS, 0, records.encode(list(frames.items())))\n",
                "",
            ),
        ),
        ("tests/brokers/test_compaction.py::test_frames_of_a_peer_that_sent_nothing_since_are_remembered",),
    ),
    Mutant(
        "missing-segments-not-missed",
        "a journal begins with whatever segment is there",
        (("brokers/stageflow_brokers/engine/engine.py", "    if 0 < replay.oldest < first:\n", "    if False:\n"),),
        (
            (
                "tests/brokers/test_damaged_journal.py"
                "::test_a_journal_whose_oldest_segments_are_missing_is_refused[engine-as it grew]"
            ),
        ),
    ),
    Mutant(
        "body-not-checked",
        "a body is read back without its batch being checked",
        (
            (
                "brokers/stageflow_brokers/journal/journal.py",
                "        if wrong:\n            raise self._unreadable(segment, batch, wrong)\n",
                "",
            ),
        ),
        (
            (
                "tests/brokers/test_damaged_journal.py"
                "::test_a_body_that_has_changed_on_the_disk_is_neither_delivered_nor_copied_on"
            ),
        ),
    ),
    Mutant(
        "steps-weigh-nothing",
        "what messages keep of their steps is not thought of when space is given back",
        (
            (
                "brokers/stageflow_brokers/engine/compaction.py",
                "state.live_bytes + state.step_bytes + state.fact_bytes",
                "state.live_bytes",
            ),
        ),
        ("tests/brokers/test_compaction.py::test_steps_count_as_alive_when_it_comes_to_giving_space_back",),
    ),
    Mutant(
        "death-charged-twice",
        "a death that is reported again after a restart is charged again",
        (
            (
                "brokers/stageflow_brokers/core/supervision.py",
                "message.delivery_state is not None and message.delivery_state.last_death_peer == death.peer:",
                "message.delivery_state is not None and message.delivery_state.last_death_peer == -1:",
            ),
        ),
        (
            "tests/brokers/test_replay_accidents.py::test_a_death_that_is_reported_again_after_a_restart_is_charged_once",
        ),
    ),
    Mutant(
        "held-once-delayed",
        "a delayed message that has been delivered is delayed again where the clock is set back",
        (
            (
                "brokers/stageflow_brokers/core/machine.py",
                "        self.writer.record_message_state(message)\n        message.queue.delayed_count -= 1\n",
                "        message.queue.delayed_count -= 1\n",
            ),
        ),
        (
            (
                "tests/brokers/test_replay_accidents.py"
                "::test_a_delayed_message_that_has_been_delivered_stays_its_holders_though_the_clock_is_set_back"
            ),
        ),
    ),
    Mutant(
        "answers-without-end",
        "a peer is answered though it has not read what it asked for before",
        (
            (
                "brokers/stageflow_brokers/core/machine.py",
                "if op == wire.QUERY and session.unread_bytes > UNREAD_PAUSE_BYTES:",
                "if False:",
            ),
        ),
        (
            (
                "tests/brokers/test_bounded_answers.py"
                "::test_questions_wait_until_the_answers_before_have_been_read_and_are_answered_in_order"
            ),
        ),
    ),
    Mutant(
        "neighbours-charged",
        "all messages of a dead worker are charged with its death",
        (
            (
                "brokers/stageflow_brokers/core/leases.py",
                "else [m for m in consumer.held.values() if m.id in responsible]",
                "else list(consumer.held.values())",
            ),
        ),
        ("tests/brokers/test_contract.py::TestBrokers::test_only_the_responsible_message_is_charged[memory]",),
    ),
    Mutant(
        "deaths-never-forgotten",
        "deaths count in a row though messages were settled well in between",
        (
            (
                "stageflow_actors/runtime/node/exit_policy.py",
                "        if states[0].settled:\n            self._deaths = 0\n",
                "",
            ),
        ),
        ("tests/chaos/test_pool_deaths.py::test_a_message_settled_well_makes_the_next_death_the_first_one_again",),
    ),
    Mutant(
        "failed-starts-never-forgotten",
        "failed starts count in a row though workers have worked in between",
        (
            (
                "stageflow_actors/runtime/node/exit_policy.py",
                "        if started:\n            self._failed_starts = 0\n",
                "",
            ),
        ),
        (
            "tests/chaos/test_pool_deaths.py::test_a_worker_that_begins_something_makes_the_next_failed_start_the_first_one_again",
        ),
    ),
    Mutant(
        "no-back-off",
        "a worker that dies repeatedly is restarted without a delay",
        (
            (
                "stageflow_actors/runtime/node/exit_policy.py",
                "        if self._deaths > 1:\n            self.back_off(self._deaths - 1, now)\n",
                "",
            ),
        ),
        ("tests/chaos/test_pool_deaths.py::test_the_first_restart_is_immediate_and_the_second_in_a_row_is_not",),
    ),
    Mutant(
        "pause-of-a-pool-never-over",
        "a resumed queue is still reported as paused by its pool",
        (
            (
                "stageflow_actors/runtime/node/pool_pause.py",
                '        self._broker.admin.set_fact(PAUSED_BY_POOL_FACT + self._queue, "no")\n',
                "",
            ),
        ),
        (
            "tests/chaos/test_pool_deaths.py::test_a_pool_that_has_been_resumed_forgets_what_was_and_that_it_had_paused_itself",
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
        "judging-counts-as-work",
        "a worker that only settles the death of another one counts as successful",
        (
            (
                "stageflow_actors/runtime/worker/actor.py",
                "        self._ran += settled.user_code_ran\n",
                "        self._ran += 1\n",
            ),
        ),
        ("tests/chaos/test_messages_in_hand.py::test_only_what_ran_here_counts_as_a_success",),
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
        "services-closed-in-order",
        "a service is closed before one that was made of it",
        (
            (
                "stageflow_actors/runtime/worker/services.py",
                "self._closers.pop()",
                "self._closers.pop(0)",
            ),
        ),
        (
            "tests/testing/test_in_process_services.py::test_services_are_closed_in_reverse_order_at_the_end_of_the_run[asynchronous]",
        ),
    ),
    Mutant(
        "service-closed-twice",
        "a service that another factory returns again is closed by both",
        (
            (
                "stageflow_actors/runtime/worker/services.py",
                "return None if id(service) in self._known else _closer_of(service)",
                "return _closer_of(service)",
            ),
        ),
        ("tests/testing/test_in_process_services.py::test_a_service_that_is_another_one_is_closed_once",),
    ),
    Mutant(
        "async-service-left-elsewhere",
        "an async context manager is left by another task than the one that entered it",
        (
            (
                "stageflow_actors/runtime/worker/services.py",
                "        self._jobs.put_nowait((work, done))\n        return await done\n",
                "        return await work\n",
            ),
        ),
        (
            "tests/runtime/test_worker_services.py::test_a_service_is_made_once_and_closed_once[async_generator-async-stopped]",
        ),
    ),
    Mutant(
        "ending-worker-charged",
        "the last message is responsible for a crash while its worker ends",
        (
            (
                "stageflow_actors/runtime/node/exit_policy.py",
                "if expected or ending or (",
                "if expected or (",
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
        "files-not-flushed",
        "what a handler has written to an open file is lost at the end of its worker",
        (
            (
                "stageflow_actors/runtime/worker/process_exit.py",
                "        _flush_files()\n",
                "",
            ),
        ),
        ("tests/runtime/test_worker_exit.py::test_what_handlers_have_begun_is_whole[file_alone-stopped]",),
    ),
)


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants and exit")
    parser.add_argument("--check", action="store_true", help="check that each can be planted, and exit")
    given = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in given.names:
        if name not in known:
            parser.error(f"unknown mutant {name!r}; see --list")
    if given.list:
        for mutant in MUTANTS:
            print(f"{mutant.name:28} {mutant.mistake}")
        return 0
    for mutant in MUTANTS:
        plant(mutant, ROOT, dry=True)
    if given.check:
        print(f"all {len(MUTANTS)} mutants can be planted")
        return 0
    alive = []
    for mutant in [known[name] for name in given.names] or MUTANTS:
        began = time.monotonic()
        blind = survived(mutant)
        if blind:
            alive.append(mutant.name)
        how = f"LIVES, in spite of {', '.join(blind)}" if blind else f"dies by {', '.join(mutant.killers)}"
        print(f"{mutant.name:28} {how}  ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(alive)} live: {', '.join(alive)}" if alive else "all mutants died")
    return 1 if alive else 0


def survived(mutant: Mutant) -> list[str]:
    """Return the killers that pass, or do not end, with the mistake in place."""
    with TemporaryDirectory(prefix="stageflow-mutant-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, place / name)
        plant(mutant, place)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *mutant.killers]
        env = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{place / 'brokers'}"}
        run = subprocess.run(
            command, cwd=place, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
    if run.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest itself failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return [killer for killer in mutant.killers if f"FAILED {killer}" not in run.stdout]


def plant(mutant: Mutant, place: Path, *, dry: bool = False) -> None:
    """Make the mistake in the copy. Ends the script if the text to replace is not found exactly once.

    `dry`: only check whether it can be made.
    """
    for file, there, instead in mutant.edits:
        path = place / file
        text = path.read_text()
        if text.count(there) != 1:
            raise SystemExit(f"{mutant.name}: {file} has {text.count(there)} times, not once:\n{there}")
        if not dry:
            path.write_text(text.replace(there, instead))


if __name__ == "__main__":
    sys.exit(main())
