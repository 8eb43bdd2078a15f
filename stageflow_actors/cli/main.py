"""The entry point of `stageflow`: finds the command, and turns what goes wrong into one line and an exit code.

0 well, 1 it failed, 2 wrong usage, 130 Ctrl-C. Modules of commands import at their top nothing but click, so that
`--help` answers at once. No command decides anything about a workflow.
"""

from __future__ import annotations

import io
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
from stageflow_brokers.errors import BrokerError

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stageflow-actors", prog_name="stageflow")
def cli() -> None:
    """Durable sagas on one machine: run them, look at them, mend them.

    \b
    stageflow run orders.py:orders --input orders.jsonl --key order_id
    stageflow instances list --status failed
    stageflow dlq list

    `run` and `up` start a cluster; `start`, `scale` and `health` need one that runs; the others look at the data
    directory that is given by --data or STAGEFLOW_DATA, running or not.
    Exit codes: 0 well, 1 it failed, 2 wrong usage.
    """


for command in (run, up, start, instances, queue, dlq, journal, history, scale, stats, health, doctor, graph):
    cli.add_command(command)


class _Text(click.ParamType[str, object]):
    """Text that can be stored and sent, which bytes that are no UTF-8 cannot be."""

    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(click.STRING.convert(value, param, ctx))
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"{text!r} is not valid UTF-8", param, ctx)
        return text


_FILES = frozenset({"target", "target_file"})
"""Parameters that are text and name a file, or begin with the name of one, which may have any name."""


def _take_text_only(command: click.Command) -> None:
    for parameter in command.params:
        if parameter.type is click.STRING and parameter.name not in _FILES:
            parameter.type = _Text()
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _take_text_only(below)


_take_text_only(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `stageflow` with these arguments (those of the process if None) and returns its exit code."""
    _print_whatever_comes()
    try:
        code = cli.main(args=arguments, prog_name="stageflow", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "stageflow"
        _say(f"{path}: {_first_small(error.format_message())} (see `{path} --help`)")
        return 2
    except click.ClickException as error:
        _say(f"stageflow: {error.format_message()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("stageflow: interrupted")
        return 130
    except (StageFlowError, BrokerError) as error:
        _say(f"stageflow: {error}")
        return 1
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain once more when it flushes at its end.
        sys.stdout = None
        return 1
    except OSError as error:
        _say(f"stageflow: {error.filename}: {error.strerror}" if error.filename else f"stageflow: {error}")
        return 1
    except msgspec.MsgspecError as error:
        _say(f"stageflow: something stored cannot be read; was it written by a newer release? ({error})")
        return 1


def _print_whatever_comes() -> None:
    """What the terminal's encoding has no characters for is shown escaped, as on stderr: file names may be anything."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    click.echo(" ".join(text.split()), err=True)


def _first_small(text: str) -> str:
    text = text.rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
