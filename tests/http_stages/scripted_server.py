"""A real HTTP server on a free port that answers by script and records its requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

Answer = Callable[["Handler"], None]


class Server:
    """`answers` are by path: one for each request in turn, the last one for all that follow."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.released = threading.Event()

    def on(self, path: str, *answers: Answer) -> str:
        """Answer requests for `path` so, and give its url."""
        self.answers[path] = list(answers)
        return self.url + path


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    kept: Server

    def _handle(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        path = self.path.partition("?")[0]
        self.kept.asked.append((self.command, self.path, headers, json.loads(body) if body else None))
        answers = self.kept.answers.get(path)
        if answers is None:
            reply(404, {"error": f"nothing at {path}"})(self)
        else:
            (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle  # noqa: N815 - the names http.server calls

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name http.server uses
        """Nobody reads it."""


def reply(status: int, value: Any = None, **headers: str) -> Answer:
    """Answer with JSON."""
    return raw(status, b"" if value is None else json.dumps(value).encode(), content_type="application/json", **headers)


def raw(status: int, body: bytes, **headers: str) -> Answer:
    """Answer with these bytes."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, header in headers.items():
            handler.send_header(name.replace("_", "-"), header)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def hang_up(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def stop_halfway(handler: Handler) -> None:
    """Announce more than is sent."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"half":')
    handler.close_connection = True


def keep_silent(handler: Handler) -> None:
    """Say nothing until the test is over."""
    handler.kept.released.wait(30)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """Send one byte at intervals, forever."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        while not handler.kept.released.wait(0.02):
            handler.wfile.write(b"1\r\n \r\n")
    except OSError:
        pass
    handler.close_connection = True


def flood(handler: Handler) -> None:
    """Send too much, without a content length."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        for _ in range(64):
            handler.wfile.write(b"100000\r\n" + b"7" * (1 << 20) + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")
    except OSError:
        pass
    handler.close_connection = True
