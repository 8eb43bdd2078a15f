"""`stageflow graph`: a workflow as a picture, in Mermaid's words."""

from __future__ import annotations

import click

__all__ = ["graph"]


@click.command()
@click.argument("target", metavar="MODULE:WORKFLOW")
def graph(target: str) -> None:
    """The workflow as Mermaid text, which GitHub, GitLab and many editors draw.

    MODULE is an importable module or a path to a .py file. Nothing of the workflow is run.

    \b
    stageflow graph orders.py:orders
    stageflow graph orders.py:orders > orders.mmd
    """
    from stageflow_actors.cli.importer import load
    from stageflow_actors.definition.mermaid import mermaid
    from stageflow_actors.definition.workflow import Workflow

    workflow = load(target, Workflow)
    workflow.validate({name for stage in workflow.stages for name in stage.services | stage.compensation_services})
    click.echo(mermaid(workflow), nl=False)
