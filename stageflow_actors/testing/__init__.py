"""Workflows and contexts in the calling thread, for unit tests and debuggers.

================  =====================================================================
`in_process`      `run`: one instance from start to end
`single_stage`    `stage_context`: the `ctx` for the test of one handler
================  =====================================================================

They open no socket, start no process and write no file.
"""

from stageflow_actors.testing.in_process import run
from stageflow_actors.testing.single_stage import stage_context

__all__ = ["run", "stage_context"]
