"""`stageflow scale` and `stageflow health`: commands on a running cluster as a whole."""

from __future__ import annotations

from pathlib import Path

import click

from stageflow_actors.cli.options import data_option, json_option

__all__ = ["health", "scale"]


@click.command()
@click.argument("workflow")
@click.argument("stage")
@click.argument("actors", type=click.IntRange(0, 1_000), metavar="N")
@data_option
def scale(workflow: str, stage: str, actors: int, data: Path) -> None:
    """Set the number of worker processes of a stage.

    Runs STAGE of WORKFLOW (their ids) with N worker processes, 0 to 1,000, until the cluster stops or is scaled again.
    For a map stage, scales its item workers. When scaling down, idle workers stop first, and busy workers stop after
    their current message.

    \b
    stageflow scale orders process-payment 8
    """
    from stageflow_actors.runtime.runtime import Runtime

    with Runtime.connect(data) as client:
        client.scale(workflow, stage, actors)


@click.command()
@json_option
@data_option
def health(output: str, data: Path) -> int:
    """Check that broker, coordinator and all pools are healthy.

    Prints "healthy" and exits with 0, or prints a line for each fault and exits with 1. A cluster that does not run is
    a fault. Suits a liveness probe.

    \b
    stageflow health
    stageflow health --output json
    """
    from stageflow_actors.cli.output import print_json
    from stageflow_actors.diagnostics.health import examine

    faults = examine(data)
    if output == "json":
        print_json({"healthy": not faults, "faults": [{"part": f.part, "fault": f.text} for f in faults]})
    elif faults:
        for fault in faults:
            click.echo(f"{fault.part}: {fault.text}")
    else:
        click.echo("healthy")
    return 1 if faults else 0
