"""Mistakes in a worker and in the routing that it does."""

from __future__ import annotations

from mutating.mutant import Mutant

MUTANTS = (
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
        "unmet-in-the-first-attempt",
        "a stage with unmet dependencies is reported with one attempt, whatever the number",
        (
            (
                "stageflow_actors/runtime/worker/executors/base.py",
                "self._fail_stage(item, envelope, failure, attempt, self._wall(), 0.0)",
                "self._fail_stage(item, envelope, failure, 1, self._wall(), 0.0)",
            ),
        ),
        (
            (
                "tests/runtime/test_api_failures.py"
                "::test_an_unmet_after_of_a_message_that_expired_before_is_the_failure_of_its_second_attempt"
            ),
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
    Mutant(
        "undecodable-is-failure",
        "a context that the new code cannot decode fails its stage, and completed stages are compensated",
        (
            (
                "stageflow_actors/runtime/worker/executors/stage.py",
                "            return self._park_undecodable(item, UndecodableData(str(error), field=error.field))\n",
                "            return super()._handle_failure(item, envelope, attempt, started, 0.0, error)\n",
            ),
        ),
        ("tests/constructs/test_undecodable_places.py::test_undecodable_data_parks_each_kind_of_message_where_it_is",),
    ),
    Mutant(
        "compensated-unread",
        "a compensation whose context cannot be decoded has failed",
        (
            (
                "stageflow_actors/runtime/worker/executors/compensation.py",
                "            undecodable = find_undecodable(error)\n",
                "            undecodable = None\n",
            ),
        ),
        ("tests/constructs/test_undecodable_places.py::test_undecodable_data_parks_each_kind_of_message_where_it_is",),
    ),
    Mutant(
        "group-by-one-leaf",
        "a group of exceptions is retried if one of its leaves is, not each",
        (
            (
                "stageflow_actors/definition/retry.py",
                "or all(map(self._is_leaf_retried, leaves))",
                "or any(map(self._is_leaf_retried, leaves))",
            ),
        ),
        ("tests/definition/test_retry.py::test_a_group_is_retried_by_its_leaves[options2-error2-False]",),
    ),
    Mutant(
        "traceback-counts-in-the-limit",
        "the tracebacks of earlier attempts count in max_message_bytes",
        (
            (
                "stageflow_actors/runtime/worker/executors/stage.py",
                'if len(done) > self._limit and len(done) - len(envelope.tracebacks or b"") > self._limit:',
                "if len(done) > self._limit:",
            ),
        ),
        ("tests/testing/test_in_process_tracebacks.py::test_a_traceback_does_not_count_in_max_message_bytes[plain]",),
    ),
    Mutant(
        "traceback-counts-in-a-transition",
        "the traceback of a stage that is retried counts in max_message_bytes",
        (
            (
                "stageflow_actors/runtime/worker/executors/base.py",
                '            largest -= len(envelope.tracebacks or b"")\n',
                "            pass\n",
            ),
        ),
        ("tests/testing/test_in_process_tracebacks.py::test_a_traceback_does_not_count_in_max_message_bytes[last]",),
    ),
    Mutant(
        "uncertain-forgotten",
        "an attempt whose effect is unknown is forgotten when the next attempt fails in another way",
        (
            (
                "stageflow_actors/runtime/worker/executors/base.py",
                '            RememberedSteps(self._store(item), item).keep(UNCERTAIN_MARK, b"")\n',
                "            pass\n",
            ),
        ),
        ("tests/testing/test_in_process_uncertain.py::test_an_earlier_attempt_of_unknown_effect_counts_too",),
    ),
    Mutant(
        "retry-undoes-twice",
        "a retry of failed compensations also runs those again that succeeded",
        (
            (
                "stageflow_actors/core/routing.py",
                "    failed = [record.stage_id for record in done if record.status == StageStatus.failed]\n",
                "    failed = [record.stage_id for record in done]\n",
            ),
        ),
        (
            (
                "tests/constructs/test_compensation_retry.py"
                "::test_the_failed_compensations_run_again_in_their_order_until_all_have_succeeded"
            ),
        ),
    ),
)
