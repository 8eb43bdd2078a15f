"""Tests of the brokers share the world in `brokerworld.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
