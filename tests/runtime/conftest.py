"""Real clusters and their effect log for tests of the public API."""

from cluster_fixtures import gate, serve
from effect_log import effects

__all__ = ["effects", "gate", "serve"]
