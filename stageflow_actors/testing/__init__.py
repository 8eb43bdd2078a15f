"""Workflows run in this process, without broker and subprocess, for unit tests and debuggers.

`run` does one instance from start to end; it never opens a socket, starts a process or writes a file.
"""

from stageflow_actors.testing.in_process import run

__all__ = ["run"]
