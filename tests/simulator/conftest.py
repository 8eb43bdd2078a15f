"""Put the modules of the simulated cluster on `sys.path`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
