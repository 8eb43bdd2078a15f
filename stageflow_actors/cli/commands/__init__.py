"""The commands of `stageflow`, one file per command or group. `cli/main.py` collects them."""
