"""Mistakes in the broker's decisions: leases, settlements, gathers, priorities."""

from __future__ import annotations

from mutating.mutant import Mutant

MUTANTS = (
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
        "greeting-taken-twice",
        "a hello that arrives twice takes back later deliveries",
        (("brokers/stageflow_brokers/core/machine.py", "elif hello.number <= session.hello_number:", "elif False:"),),
        (
            "tests/brokers/test_connection_accidents.py::test_a_hello_that_arrives_twice_takes_nothing_back",
            "tests/simulator/test_named_seeds.py::test_a_bug_found_once_is_not_found_again[greeting-twice]",
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
        "earlier-deadline-counts",
        "a gather ends at a deadline of an earlier opening of its key",
        (("brokers/stageflow_brokers/core/gathers.py", " and gather.due == due:", ":"),),
        (
            "tests/brokers/test_reopened_gathers.py::test_a_second_wait_for_a_signal_ends_at_no_deadline_of_the_first[later-live]",
        ),
    ),
    Mutant(
        "deadline-not-cleared",
        "a gather that is opened without a deadline keeps that of the opening before",
        (
            (
                "brokers/stageflow_brokers/core/gather.py",
                "        self.priority = priority\n        self.due = self.due_wall = self.wait = 0.0\n",
                "        self.priority = priority\n",
            ),
            (
                "brokers/stageflow_brokers/core/gather.py",
                "        self.weight -= sum(map(len, bodies))\n        self.due = self.due_wall = self.wait = 0.0\n",
                "        self.weight -= sum(map(len, bodies))\n",
            ),
        ),
        (
            "tests/brokers/test_reopened_gathers.py::test_a_second_wait_for_a_signal_ends_at_no_deadline_of_the_first[none-live]",
        ),
    ),
    Mutant(
        "forgotten-ends-count-as-none",
        "a start is accepted whose group may have ended longer ago than the broker remembers",
        (
            (
                "brokers/stageflow_brokers/core/publish.py",
                "return sequence < state.closed_floor or state.closed_groups",
                "return state.closed_groups",
            ),
        ),
        (
            "tests/brokers/test_forgotten_ends.py::test_a_start_that_is_older_than_what_the_broker_remembers_is_sent_to_the_history",
        ),
    ),
    Mutant(
        "credit-of-removed-messages-stays",
        "messages of groups that have left take the credit of a worker that greets again",
        (("brokers/stageflow_brokers/core/leases.py", "            consumer.removed_ids.clear()\n", ""),),
        (
            "tests/brokers/test_connection_accidents.py::test_a_worker_that_greets_again_without_the_message_of_a_group_that_has_left_gets_the_next_one",
        ),
    ),
    Mutant(
        "last-watcher-only",
        "a watch of a group ends the watches of other sessions",
        (
            (
                "brokers/stageflow_brokers/core/watches.py",
                "[w for w in group.watchers if w.connected] + [session]",
                "[session]",
            ),
        ),
        (
            "tests/brokers/test_contract.py::TestBrokers::test_each_watcher_of_a_group_is_notified_of_its_halt_its_end_and_its_leaving[memory]",
        ),
    ),
    Mutant(
        "answers-not-kept",
        "a request that is sent again is carried out again, on what it left",
        (
            (
                "brokers/stageflow_brokers/core/sessions.py",
                "        self.answers[frame] = answer\n        if len(self.answers) > ANSWERS_KEPT:\n",
                "        if len(self.answers) > ANSWERS_KEPT:\n",
            ),
        ),
        (
            "tests/brokers/test_repeated_requests.py::test_a_request_that_is_sent_again_after_a_reconnect_gets_the_same_answer[requeue]",
            "tests/brokers/test_repeated_requests.py::test_a_request_that_is_sent_again_after_a_reconnect_gets_the_same_answer[purge]",
            "tests/brokers/test_repeated_requests.py::test_a_request_that_is_sent_again_after_a_reconnect_gets_the_same_answer[hand_over]",
            "tests/brokers/test_repeated_requests.py::test_a_request_that_is_sent_again_after_a_reconnect_gets_the_same_answer[replace]",
            "tests/brokers/test_repeated_requests.py::test_a_request_that_is_sent_again_after_a_reconnect_gets_the_same_answer[restart]",
        ),
    ),
)
