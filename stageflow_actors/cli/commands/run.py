"""`stageflow run`: run one instance per record of a file.

Finished records are recognised by the ids of their instances: after an interruption the same command resumes.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.log_options import configure_logging, log_options
from stageflow_actors.cli.options import DEFAULT_DATA, runtime_data_option
from stageflow_actors.cli.output import span
from stageflow_actors.cli.stop_signals import on_stop_signals

if TYPE_CHECKING:
    from stageflow_actors.cli.input_file import InputLine, Lines
    from stageflow_actors.cli.results_file import ResultsFile, Tally
    from stageflow_actors.definition.workflow import Workflow
    from stageflow_actors.runtime.runtime import Runtime

__all__ = ["run"]

MAX_REPORTED_LINES = 20
"""Refused lines that are reported one by one; further ones are counted."""


@click.command()
@click.argument("target", metavar="MODULE:NAME")
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Input: JSON lines, a JSON array, CSV or TSV, each also as .gz; - reads stdin.",
)
@click.option(
    "--key",
    default=None,
    metavar="FIELD",
    help="Field that holds the instance's id.  [default: file name and number of the line or element]",
)
@click.option(
    "--results",
    "target_file",
    default=None,
    metavar="FILE",
    help="Write one JSON object per instance to FILE: instance_id, status, error, context; - is stdout.",
)
@click.option(
    "--workflow", "workflow_id", default=None, metavar="ID", help="Workflow to run, if the Runtime has several."
)
@click.option("--fresh", is_flag=True, help="Rename an existing data directory first, and run every line.")
@click.option("--retry-failed", is_flag=True, help="Run instances again that ended with another status than completed.")
@runtime_data_option
@log_options
@click.option(
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Format of the summary: text on stderr, or JSON on stdout.",
)
def run(
    target: str,
    source: str,
    key: str | None,
    target_file: str | None,
    workflow_id: str | None,
    fresh: bool,
    retry_failed: bool,
    data: Path | None,
    log_level: str | None,
    log_format: str | None,
    output: str,
) -> int:
    """Run a workflow over a file: one instance per record.

    A record is a line of JSON, an element of a JSON array, or a row of CSV or TSV with a header. First bytes and name
    of the file show which; the delimiter of rows is a comma, semicolon, tab or vertical bar.

    MODULE is an importable module or a path to a .py file. NAME in it is a Workflow, or a Runtime with its services and
    Config. After a crash, a kill or Ctrl-C, the same command skips the finished lines and runs the others. The file of
    --results appears when the run is finished; an interrupted run leaves its results in FILE.part.

    \b
    stageflow run orders.py:orders --input orders.jsonl --key order_id
    stageflow run shop.flows:runtime --input orders.csv --results out.jsonl
    stageflow run orders.py:orders --input orders.jsonl.gz
    psql --csv -c 'table orders' | stageflow run orders.py:orders --input -
    stageflow run orders.py:orders --input orders.jsonl --retry-failed

    Exit code 1 if an instance did not complete or a record was refused, 2 if the file is of a kind that is not read,
    130 after Ctrl-C.
    """
    from stageflow_actors.cli.importer import load
    from stageflow_actors.cli.results_file import ResultsFile
    from stageflow_actors.definition.workflow import Workflow
    from stageflow_actors.runtime.runtime import Runtime

    found = load(target, Workflow, Runtime)
    configure_logging(log_level, log_format)
    runtime = found if isinstance(found, Runtime) else Runtime(found, data_dir=data or DEFAULT_DATA)
    if data is not None:
        runtime.data_dir = data
    workflow = _workflow_of(runtime, target, workflow_id)
    if key == "":
        raise click.UsageError("--key is empty: name the field that holds the instance's id")
    file = ResultsFile(target_file, source) if target_file is not None else None
    try:
        prepared = _Run(runtime, workflow, source, key, file, retry_failed, output)
        if fresh:
            _rename_directory(Path(runtime.data_dir))
        on_stop_signals(signal.default_int_handler)  # each ends the run as Ctrl-C does
        return prepared.go()
    except BaseException:
        if file is not None:
            file.discard()
        raise


class _Run:
    """One run: reads lines, writes results, reports on stderr."""

    def __init__(
        self,
        runtime: Runtime,
        workflow: Workflow[Any],
        source: str,
        key: str | None,
        file: ResultsFile | None,
        retry_failed: bool,
        output: str,
    ) -> None:
        from stageflow_actors.cli.csv_values import row_reader
        from stageflow_actors.cli.input_file import Lines, count_lines
        from stageflow_actors.cli.progress import Progress
        from stageflow_actors.cli.results_file import Tally
        from stageflow_actors.core.codec import ContextCodec
        from stageflow_actors.core.schema import key_reader

        self._runtime = runtime
        self._workflow = workflow
        self._file = file
        self._retry_failed = retry_failed
        self._output = output
        self._lines: Lines = Lines(
            source,
            key=key,
            refuse=self._refuse,
            convert=row_reader(ContextCodec(workflow.context)),
            typed_keys=key_reader(workflow.context),
            largest=runtime.config.max_message_bytes,
        )
        self._lines.check()
        self._total = count_lines(source)
        self._progress = Progress(workflow.id, self._total)
        self._tally: Tally = Tally(time.time())
        self._numbers: dict[str, deque[int]] = {}
        self._began = time.monotonic()

    def go(self) -> int:
        """Run all lines and return the exit code. Raises `StageFlowError` for an error that ends the whole run."""
        from stageflow_actors.errors import StageFlowError

        interrupted = False
        try:
            with self._runtime, self._progress:
                try:
                    self._run_all()
                except KeyboardInterrupt:
                    interrupted = self._interrupted()
                    raise
        except KeyboardInterrupt:
            interrupted = interrupted or self._interrupted()
        except StageFlowError:
            self._keep()
            raise
        if interrupted:
            self._keep()
        elif self._file is not None:
            self._file.finish()
        if not self._tally.seen and not interrupted:
            self._print(f"no {self._lines.unit}s in {self._lines.name}")
        self._print_summary(interrupted)
        return 130 if interrupted else 0 if self._tally.well else 1

    def _run_all(self) -> None:
        from stageflow_actors.core.codec import json_view
        from stageflow_actors.errors import BrokerUnavailable

        results = self._runtime.map_unordered(
            self._workflow, self._contexts(), key=lambda line: line.key, retry_failed=self._retry_failed
        )
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except BrokerUnavailable:
                raise
            except Exception as error:
                instance_id: str | None = getattr(error, "instance_id", None)
                if instance_id is None:
                    raise
                self._refuse(self._number_of(instance_id), str(error))
                continue
            self._number_of(result.instance_id)
            self._tally.add(result)
            if self._file is not None:
                self._file.write(result, json_view(result._outcome_read().context))
            self._show_progress()

    def _contexts(self) -> Iterator[InputLine]:
        for line in self._lines:
            self._numbers.setdefault(line.key, deque()).append(line.number)
            yield line

    def _number_of(self, instance_id: str | None) -> int | None:
        """Take and return the number of the line that became this instance."""
        numbers = self._numbers.get(instance_id or "")
        if not numbers:
            return None
        number = numbers.popleft()
        if not numbers:
            del self._numbers[instance_id or ""]
        return number

    def _refuse(self, number: int | None, reason: str) -> None:
        self._tally.refused += 1
        if self._tally.refused <= MAX_REPORTED_LINES:
            where = f"{self._lines.name} {self._lines.unit} {number}" if number is not None else self._lines.name
            self._print(f"{where}: {' '.join(reason.split())}")
        elif self._tally.refused == MAX_REPORTED_LINES + 1:
            self._print("more lines were refused; the summary counts them")

    def _interrupted(self) -> bool:
        self._progress.stop()
        self._print("interrupted: finishing the stages in work; run the same command again to resume")
        return True

    def _keep(self) -> None:
        kept = None if self._file is None else self._file.keep()
        if kept is not None:
            self._print(kept)

    def _show_progress(self) -> None:
        tally = self._tally
        bad = tally.results - tally.statuses["completed"]
        note = f"{bad:,} not completed" if bad else ""
        self._progress.update(tally.seen, note)

    def _print_summary(self, interrupted: bool) -> None:
        tally = self._tally
        seconds = time.monotonic() - self._began
        rate = tally.done / seconds if seconds else 0.0
        if self._output == "json":
            from stageflow_actors.cli.output import print_json

            print_json(
                {
                    "done": tally.done,
                    "skipped": tally.skipped,
                    "statuses": dict(tally.statuses),
                    "refused": tally.refused,
                    "seconds": seconds,
                    "rate": rate,
                    "interrupted": interrupted,
                }
            )
            return
        statuses = ", ".join(f"{number:,} {status}" for status, number in tally.statuses.most_common())
        parts = [f"{tally.done:,} done"]
        if tally.skipped:
            parts.append(f"{tally.skipped:,} skipped (done before)")
        if tally.refused:
            parts.append(f"{tally.refused:,} refused")
        self._print(
            f"{self._workflow.id}: {', '.join(parts)} in {span(seconds)}"
            + (f" ({rate:,.0f}/s)" if tally.done else "")
            + (f": {statuses}" if statuses else "")
        )

    def _print(self, text: str) -> None:
        self._progress.print(text)


def _workflow_of(runtime: Runtime, target: str, workflow_id: str | None) -> Workflow[Any]:
    workflows = {workflow.id: workflow for workflow in runtime.workflows}
    if workflow_id is None and len(workflows) == 1:
        return next(iter(workflows.values()))
    if not workflows:
        raise click.UsageError(f"{target} has no workflows: pass them, as in Runtime(orders)")
    names = ", ".join(workflows)
    if workflow_id is None:
        raise click.UsageError(f"{target} has several workflows: choose one with --workflow ({names})")
    if workflow_id not in workflows:
        raise click.UsageError(f"{target} has no workflow {workflow_id!r}; it has {names}")
    return workflows[workflow_id]


def _rename_directory(path: Path) -> None:
    """Rename the data directory.

    Raises `JournalLocked` while a cluster runs, `click.UsageError` for a directory that holds no cluster.
    """
    import os

    from stageflow_actors.runtime.system.data_dir import DataDir

    if not path.exists():
        return
    data_dir = DataDir(path, create=False)
    if not data_dir.is_empty_or_used():
        raise click.UsageError(
            f"--fresh would rename {data_dir.path}, which holds other files and no cluster; check --data"
        )
    data_dir.acquire(os.getpid())
    try:
        data_dir.remove_cluster()
        stamp = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}"
        aside = data_dir.path.with_name(f"{data_dir.path.name}.old-{stamp}")
        number = 1
        while aside.exists():
            number += 1
            aside = data_dir.path.with_name(f"{data_dir.path.name}.old-{stamp}-{number}")
        data_dir.path.rename(aside)
    finally:
        data_dir.release()
    click.echo(f"{path} renamed to {aside}", err=True)
