"""Workflows in the calling thread, for unit tests and debuggers.

`run` runs one instance from start to end. It opens no socket, starts no process and writes no file.
"""

from stageflow_actors.testing.in_process import run

__all__ = ["run"]
