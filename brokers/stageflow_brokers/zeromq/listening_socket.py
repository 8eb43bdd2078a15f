"""`ListeningSocket`: keeps the broker's socket at a path where clients and workers find it.

Connections survive the removal of the socket's file, but no further one can be made without it. This module must never
close the listener of an older place, because its connections would be lost with it.
"""

from __future__ import annotations

import logging
import time

import zmq

from stageflow_brokers.errors import SocketNotPrivate
from stageflow_brokers.zeromq.access import check_address
from stageflow_brokers.zeromq.socket_path import ShortAddress, directory_of, places, remake_directory, socket_exists

__all__ = ["ListeningSocket"]

logger = logging.getLogger(__name__)

CHECK_INTERVAL_SECONDS = 1.0
"""Seconds between checks that the file of the socket still exists."""


class ListeningSocket:
    """Binds `router` to `address`, or to another place of it if the directory of the address cannot be made.

    Raises `SocketNotPrivate` if other users have access to the directory, `zmq.ZMQError` if ZeroMQ cannot bind.
    """

    def __init__(self, router: zmq.Socket[bytes], address: str) -> None:
        self._router = router
        self._address = address
        self._bound: list[ShortAddress] = []
        self._check_due = time.monotonic() + CHECK_INTERVAL_SECONDS
        self._is_missing = False
        for place in places(address):
            if self._make(place):
                self._bind(place)
                return
        self._bind(address)  # names the problem of the preferred place

    def check(self, now: float) -> None:
        """Make the place of the socket again if its file has vanished; look at most once a second of `now`."""
        if now < self._check_due:
            return
        self._check_due = now + CHECK_INTERVAL_SECONDS
        if socket_exists(self._bound[-1].address):
            return
        for place in places(self._address):
            if not self._make(place):
                continue
            try:
                self._bind(place)
            except (OSError, SocketNotPrivate, zmq.ZMQError):
                continue
            self._is_missing = False
            logger.warning("the broker's socket had been removed; the broker listens at %s now", place)
            return
        if not self._is_missing:
            self._is_missing = True
            logger.warning(
                "the directory of the broker's socket, %s, has been removed and cannot be created again: no further "
                "worker or client can connect. Create it with mode 0700, or restart the program",
                directory_of(self._address),
            )

    def close(self) -> None:
        """Remove the directories in other places. The socket belongs to the caller, who has closed it before."""
        for bound in self._bound:
            bound.close()
            if bound.address != self._address:
                try:
                    directory_of(bound.address).rmdir()
                except OSError:
                    pass

    def _make(self, place: str) -> bool:
        try:
            remake_directory(place)
        except OSError:
            return False
        return True

    def _bind(self, place: str) -> None:
        check_address(place)
        short = ShortAddress(place)
        try:
            self._router.bind(short.text)
        except BaseException:
            short.close()
            raise
        self._bound.append(short)
