"""Mistakes with what waits: priority, pause and idle workers do not act on what workers have taken."""

from __future__ import annotations

from mutating.mutant import Mutant

_RECALLS = "brokers/stageflow_brokers/core/recalls.py"

MUTANTS = (
    Mutant(
        "urgent-behind-taken",
        "a message of a higher priority recalls nothing",
        ((_RECALLS, "        if behind:\n", "        if False and behind:\n"),),
        (
            "tests/brokers/test_contract.py::TestBrokers::test_what_waits_behind_a_message_of_higher_priority_is_recalled[memory]",
            "tests/brokers/test_recalls.py::test_negative_priorities_give_way_to_those_without_one",
        ),
    ),
    Mutant(
        "urgent-behind-work",
        "a message of a higher priority is delivered behind one in work, while another worker ends first",
        (
            (
                _RECALLS,
                "[c for c in free if len(c.held) < c.concurrency or c.lowest_priority >= priority]",
                "free",
            ),
        ),
        ("tests/brokers/test_recalls.py::test_a_lower_priority_is_not_delivered_past_a_higher_one_that_waits",),
    ),
    Mutant(
        "pause-without-flag",
        "a pause is answered, and workers begin what they have taken",
        (
            (
                "brokers/stageflow_brokers/engine/engine.py",
                "                self._pause_flags.set(queue, paused)\n",
                "                pass\n",
            ),
        ),
        ("tests/brokers/test_pause_flags.py::test_a_flag_is_set_after_the_commit_and_before_the_answer",),
    ),
    Mutant(
        "flag-not-read",
        "a worker begins what it has taken from a paused queue",
        (
            (
                "stageflow_actors/runtime/worker/actor.py",
                "                if paused[0]:\n",
                "                if False and paused[0]:\n",
            ),
        ),
        (
            "tests/chaos/test_messages_in_hand.py::test_nothing_begins_once_the_queue_is_paused_and_what_waits_is_released_in_order",
        ),
    ),
    Mutant(
        "flag-stays-after-a-crash",
        "a broker that starts again leaves the flags as they are",
        (
            (
                "brokers/stageflow_brokers/engine/engine.py",
                "        if pause_flags is not None:\n",
                "        if pause_flags is not None and False:\n",
            ),
        ),
        (
            "tests/brokers/test_pause_flags.py::test_a_broker_that_died_between_the_commit_and_the_flag_leaves_no_queue_stuck",
        ),
    ),
    Mutant(
        "idle-beside-waiting",
        "what waits with a busy worker is not shared with an idle one",
        ((_RECALLS, "waiting.lease < lease", "False"),),
        (
            "tests/brokers/test_recalls.py::test_what_has_waited_for_the_share_time_is_recalled_once_for_an_idle_consumer",
        ),
    ),
    Mutant(
        "released-out-of-order",
        "what several workers release goes to the head of the queue in the order of their releases",
        (
            (
                "brokers/stageflow_brokers/core/queue.py",
                "            while lane and lane[0].lease == RELEASED and lane[0].id < last",
                "            while False and lane[0].lease == RELEASED and lane[0].id < last",
            ),
        ),
        ("tests/brokers/test_contract.py::TestBrokers::test_what_two_consumers_release_returns_in_order[memory]",),
    ),
    Mutant(
        "deliveries-overtake-a-release",
        "deliveries that were on their way during a release run before what was released",
        (
            (
                "stageflow_actors/runtime/worker/mailbox.py",
                "        self._releasing.add(release)\n",
                "",
            ),
        ),
        (
            "tests/chaos/test_messages_in_hand.py::test_what_was_on_its_way_during_a_release_does_not_overtake_what_was_released",
        ),
    ),
    Mutant(
        "prefetch-of-the-past",
        "a worker whose messages have become slow keeps all that it has taken",
        (
            (
                "stageflow_actors/runtime/worker/actor.py",
                "        surplus = self._prefetch.surplus(len(inbox))\n",
                "        surplus = 0\n",
            ),
        ),
        (
            "tests/chaos/test_messages_in_hand.py::test_a_worker_whose_messages_have_become_slow_releases_the_last_of_them",
        ),
    ),
)
