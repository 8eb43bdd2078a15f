"""The parts of `scripts/soak.py`: `load` is the program under load, `measure` samples it, `judge` compares."""
