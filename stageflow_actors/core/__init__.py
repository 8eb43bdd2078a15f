"""Decisions without sockets, clocks or files: what travels, and what follows a stage."""
