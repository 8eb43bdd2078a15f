"""The server of the tests of HTTP stages."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_server import Handler, Server


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that answers 404 until it is scripted."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        kept = Handler.kept = Server(listening.server_address[1])
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield kept
        kept.released.set()
        listening.shutdown()
        thread.join()
