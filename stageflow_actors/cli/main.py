"""The entry point of `stageflow`: finds the command, and turns an error into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C. At module level, commands import click and small modules
only: `--help` answers at once. No command decides anything about a workflow.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence

import click
import msgspec

from stageflow_actors.cli.commands import export, instance_runs, signal  # noqa: F401 - add to `instances`
from stageflow_actors.cli.commands.cluster import health, scale
from stageflow_actors.cli.commands.dlq import dlq
from stageflow_actors.cli.commands.doctor import doctor
from stageflow_actors.cli.commands.graph import graph
from stageflow_actors.cli.commands.history import history
from stageflow_actors.cli.commands.instances import instances
from stageflow_actors.cli.commands.journal import journal
from stageflow_actors.cli.commands.queue import queue
from stageflow_actors.cli.commands.run import run
from stageflow_actors.cli.commands.start import start
from stageflow_actors.cli.commands.stats import stats
from stageflow_actors.cli.commands.up import up
from stageflow_actors.errors import StageFlowError
from stageflow_actors.runtime.system.processes import occupy_standard_descriptors
from stageflow_brokers.errors import BrokerError

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stageflow-actors", prog_name="stageflow")
def cli() -> None:
    """Run durable workflows, inspect them and repair them.

    \b
    stageflow run orders.py:orders --input orders.jsonl --key order_id
    stageflow instances list --status failed
    stageflow dlq list

    `run` and `up` start a cluster. `start`, `scale` and `health` need a running cluster. The other commands work on
    the data directory of --data or STAGEFLOW_DATA, whether its cluster runs or not.

    Exit codes: 0 success, 1 failure, 2 wrong usage.
    """


for command in (run, up, start, instances, queue, dlq, journal, history, scale, stats, health, doctor, graph):
    cli.add_command(command)


class _Text(click.ParamType[str, object]):
    """Text that can be stored and sent: valid UTF-8."""

    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(click.STRING.convert(value, param, ctx))
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"{text!r} is not valid UTF-8", param, ctx)
        return text


_FILES = frozenset({"target", "target_file"})
"""Text parameters that name a file or a module. A file name may hold any bytes."""


def _use_text_type(command: click.Command) -> None:
    for parameter in command.params:
        if parameter.type is click.STRING and parameter.name not in _FILES:
            parameter.type = _Text()
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _use_text_type(below)


_use_text_type(cli)


_NUMBERS = {"integer": "a whole number", "float": "a number"}
_KINDS_OF_CLICK = re.compile(r"a valid (integer|float)(?: range)?\b")
"""The names of click for numbers; ours."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `stageflow` with `arguments` (None: those of the process) and return its exit code."""
    occupy_standard_descriptors()  # a file that gets the number 2 would receive error messages
    _escape_unprintable()
    try:
        code = cli.main(args=arguments, prog_name="stageflow", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "stageflow"
        text = _KINDS_OF_CLICK.sub(lambda kind: _NUMBERS[kind[1]], _lower_first(error.format_message()))
        _print_error(f"{path}: {text} (see `{path} --help`)")
        return 2
    except click.ClickException as error:
        _print_error(f"stageflow: {error.format_message()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _print_error("stageflow: interrupted")
        return 130
    except (StageFlowError, BrokerError) as error:
        if not getattr(error, "_noticed", False):
            _print_error(f"stageflow: {error}")
        return 1
    except BrokenPipeError:
        # The reader of the output has closed it. Python would report that once more when it flushes at exit.
        sys.stdout = None
        return 1
    except OSError as error:
        _print_error(f"stageflow: {error.filename}: {error.strerror}" if error.filename else f"stageflow: {error}")
        return 1
    except msgspec.MsgspecError as error:
        _print_error(f"stageflow: stored data cannot be read; was it written by a newer release? ({error})")
        return 1


def _escape_unprintable() -> None:
    """Escape characters that the encoding of stdout does not have, as stderr does: file names may hold any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _print_error(text: str) -> None:
    click.echo(" ".join(text.split()), err=True)


def _lower_first(text: str) -> str:
    text = text.rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
