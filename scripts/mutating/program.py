"""Mistakes in the calls of a program and in the command line."""

from __future__ import annotations

from mutating.mutant import Mutant

MUTANTS = (
    Mutant(
        "retried-once-more",
        "a failed instance that was retried is retried for each later context of its key",
        (("stageflow_actors/runtime/client/map_iterator.py", " and row.epoch != self._retried.get(request.id):", ":"),),
        (
            "tests/runtime/test_api_map.py::test_retry_failed_does_not_run_again_what_has_failed_again_under_a_key_that_comes_later",
        ),
    ),
    Mutant(
        "evidence-fails-the-others",
        "a requeue of all dead letters fails because of one that is evidence",
        (
            (
                "stageflow_actors/cli/commands/dlq.py",
                "return 0 if done or not refused else 1",
                "return 1 if refused else 0",
            ),
        ),
        ("tests/cli/test_cli_dead_letters.py::test_requeue_of_all_fails_only_if_all_are_evidence[beside_another]",),
    ),
    Mutant(
        "evidence-is-success",
        "a requeue that requeued nothing succeeds",
        (("stageflow_actors/cli/commands/dlq.py", "return 0 if done or not refused else 1", "return 0"),),
        ("tests/cli/test_cli_dead_letters.py::test_requeue_of_all_fails_only_if_all_are_evidence[alone]",),
    ),
    Mutant(
        "resumed-counts-as-skipped",
        "a run counts as skipped what it resumed",
        (
            (
                "stageflow_actors/cli/results_file.py",
                "result.finished_at < self._since",
                "result.started_at < self._since",
            ),
        ),
        (
            "tests/cli/test_run_tally.py::test_an_instance_counts_as_done_by_the_run_in_which_it_has_ended[resumed_by_this_run]",
        ),
    ),
    Mutant(
        "list-too-short",
        "a list is shorter than its limit by the instances that are live and finished",
        (
            (
                "stageflow_actors/cli/commands/instances.py",
                "attached.history.list(status, workflow, limit, error):",
                "attached.history.list(status, workflow, limit - len(found), error):",
            ),
        ),
        (
            "tests/cli/test_cli_instances.py::test_a_list_is_as_long_as_its_limit_though_an_instance_is_live_and_finished",
        ),
    ),
    Mutant(
        "damage-ends-the-input",
        "an input that is damaged ends there without a report",
        (
            (
                "stageflow_actors/cli/input_file.py",
                '                self._refuse(self._number + 1, f"{error}: nothing from here on was read")\n',
                "                del error\n",
            ),
        ),
        ("tests/cli/test_inputs_of_other_kinds.py::test_damaged_gzip_is_read_up_to_the_damage_which_is_reported[cut]",),
    ),
    Mutant(
        "array-read-whole",
        "all of a JSON array is read before its first element is used",
        (
            (
                "stageflow_actors/cli/inputs/json_elements.py",
                "        chunk = self._read(max(_CHUNK_BYTES, len(self._text)))\n",
                '        chunk = b"".join(iter(lambda: self._read(_CHUNK_BYTES), b""))\n',
            ),
        ),
        ("tests/cli/test_inputs_of_other_kinds.py::test_a_large_array_is_never_in_memory_as_a_whole",),
    ),
)
