"""Workflows run in this process, without broker and subprocess, for unit tests and debuggers."""
