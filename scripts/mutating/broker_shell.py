"""Mistakes in a broker's journal, engine and clients."""

from __future__ import annotations

from mutating.mutant import Mutant

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
        "the steps that messages hold are not counted when space is released",
        (
            (
                "brokers/stageflow_brokers/engine/compaction.py",
                "state.live_bytes + state.step_bytes + state.fact_bytes",
                "state.live_bytes",
            ),
        ),
        ("tests/brokers/test_compaction.py::test_steps_count_as_alive_when_it_comes_to_giving_space_back",),
    ),
)
