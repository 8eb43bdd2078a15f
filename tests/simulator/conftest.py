"""Where the parts of the simulated cluster are found: here, and with the tests that it shares worlds and plans with."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "language", HERE.parent / "brokers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
