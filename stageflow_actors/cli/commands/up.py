"""`stageflow up`: a cluster in the foreground, until SIGTERM, Ctrl-C or the end of the terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import Any

import click

from stageflow_actors.cli.log_options import configure_logging, log_options
from stageflow_actors.cli.options import DEFAULT_DATA, runtime_data_option
from stageflow_actors.cli.stop_signals import on_stop_signals

__all__ = ["up"]


@click.command()
@click.argument("target", metavar="MODULE:RUNTIME")
@runtime_data_option
@log_options
def up(target: str, data: Path | None, log_level: str | None, log_format: str | None) -> int:
    """Serve workflows until SIGTERM or Ctrl-C.

    MODULE is an importable module or a path to a .py file. RUNTIME in it is a Runtime, or a Workflow to serve with the
    defaults. The command prints a line on stderr when the cluster is ready. SIGTERM, Ctrl-C and the end of the terminal
    stop it. A stop waits for the stages in work; a
    second Ctrl-C kills them. Unfinished instances resume at the next start.

    \b
    stageflow up shop.flows:runtime
    stageflow up orders.py:orders --data /var/lib/orders
    """
    from stageflow_actors.cli.importer import load
    from stageflow_actors.definition.workflow import Workflow
    from stageflow_actors.runtime.client.client import session_of
    from stageflow_actors.runtime.runtime import Runtime

    found = load(target, Runtime, Workflow)
    configure_logging(log_level, log_format)
    runtime = found if isinstance(found, Runtime) else Runtime(found, data_dir=data or DEFAULT_DATA)
    if data is not None:
        runtime.data_dir = data
    stop_requested = threading.Event()
    on_stop_signals(signal.default_int_handler)
    runtime.start()
    try:
        on_stop_signals(lambda *_: stop_requested.set())
        names = ", ".join(_name(workflow) for workflow in runtime.workflows)
        _announce(f"serving {names} from {runtime.data_dir}")
        while not stop_requested.wait(0.5):
            session_of(runtime).check_alive()
    except BaseException:
        runtime.stop(grace=0)
        raise
    # A service manager may send SIGHUP after SIGTERM, and a shell SIGHUP twice: it is no second Ctrl-C.
    on_stop_signals(signal.default_int_handler, on_hangup=lambda *_: None)
    _announce("stopping after the stages in work; press Ctrl-C again to kill them")
    runtime.stop()
    return 0


def _announce(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal has ended
        click.echo(f"stageflow: {text}", err=True)


def _name(workflow: Any) -> str:
    return workflow.id if workflow.version == 1 else f"{workflow.id} (version {workflow.version})"
