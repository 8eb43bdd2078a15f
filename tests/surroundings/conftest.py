"""Real programs whose surroundings are unusual."""

from own_programs import run_program

__all__ = ["run_program"]
