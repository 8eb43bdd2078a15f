"""The parts of `scripts/soak.py`: `load` is the program that is soaked, `measure` looks at it, `judge` compares.

None of them ends a process that the script has not started.
"""
