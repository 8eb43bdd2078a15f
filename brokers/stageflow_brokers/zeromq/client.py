"""A connection over a DEALER socket that one thread owns.

Other threads lay frames ready and wake it through an eventfd. The socket's own monitor tells of each (re)connect, so
that a restarted broker hears a hello at once rather than after a time-out. Nothing is said to a socket that others than
this user may have put there: neither to the first one nor, after a broker has gone, to any later one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque

import zmq
from zmq.utils.monitor import recv_monitor_message

from stageflow_brokers.api import Listener
from stageflow_brokers.client.connection import MAX_UNCONFIRMED_BYTES, Connection
from stageflow_brokers.errors import BrokerUnavailable, SocketNotPrivate
from stageflow_brokers.zeromq.access import check_address, check_listener

__all__ = ["ZmqClient"]

logger = logging.getLogger(__name__)

SILENCE = 1.0
"""Seconds after which an unanswered hello is said again."""

KNOCK_AGAIN = 0.3
"""Seconds after which whoever was turned away comes again."""

WATCHED_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH

LEAVE_TAKING = 0.05
"""Seconds between looks at whether all is confirmed, while closing."""


class ZmqClient(Connection):
    """Connects to `address` on construction, in a daemon thread of its own.

    Raises `SocketNotPrivate` if others have access to where the broker listens.
    """

    def __init__(
        self,
        address: str,
        listener: Listener,
        *,
        peer: int = 0,
        role: str = "client",
        name: str = "",
        max_unconfirmed_bytes: int = MAX_UNCONFIRMED_BYTES,
    ) -> None:
        super().__init__(listener, peer=peer, role=role, name=name, max_unconfirmed_bytes=max_unconfirmed_bytes)
        check_address(address, missing_ok=True)
        self._address = address
        self._outgoing: deque[tuple[bytes, bytes, bytes]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sleeping = False
        self._stopping = threading.Event()
        self._deadline = 0.0
        self._hello_due = float("inf")
        self._turned_away = 0.0
        self._thread = threading.Thread(target=self._run, name=f"broker-io-{name or self.peer}", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Wait up to `timeout` seconds for what is unconfirmed, then end the connection."""
        self._deadline = time.monotonic() + timeout
        with self._lock:
            # The eventfd is open for as long as the connection has not ended.
            if not self._ended and not self._stopping.is_set():
                self._stopping.set()
                os.eventfd_write(self._wakeup, 1)
        if not self.is_own_thread():
            self._thread.join(timeout + 1)

    def is_own_thread(self) -> bool:
        """Whether this is the connection's own thread."""
        return threading.current_thread() is self._thread

    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        self._outgoing.append((op, header, blob))
        if self._sleeping:
            os.eventfd_write(self._wakeup, 1)

    def send_hello(self) -> None:
        self._hello_due = time.monotonic() + SILENCE
        hello = self._hello()
        # Not welcomed any more: nothing is laid ready now, and what was is sent again.
        self._outgoing.clear()
        self._put(hello)

    def _run(self) -> None:
        context = zmq.Context()
        dealer = self._dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self.peer.to_bytes(8, "big"))
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.RCVHWM, 0)
        # What has not left when a connection breaks is sent again after the next hello, not to whoever is there next.
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.LINGER, 200)
        dealer.setsockopt(zmq.RECONNECT_IVL, 10)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 100)
        monitor = dealer.get_monitor_socket(WATCHED_EVENTS)
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        why = "the connection to the broker was closed"
        try:
            wrong = _connect(dealer, self._address)
            if wrong:
                why = f"the broker cannot be reached at {self._address!r}: {wrong}"
                return
            while not self._finished():
                self._round(poller, dealer, monitor)
            self._take_leave()
        except SocketNotPrivate as error:
            why = f"the connection to the broker has been given up: {error}"
            logger.error("%s", why)
        except Exception as error:
            why = f"the connection to the broker has failed: {error!r}"
            logger.exception("the connection to the broker at %s has failed", self._address)
        finally:
            self.end(why)
            dealer.disable_monitor()
            monitor.close(0)
            dealer.close()
            context.term()
            os.close(self._wakeup)

    def _finished(self) -> bool:
        if self._ended:
            return True
        if not self._stopping.is_set():
            return False
        return not self._unconfirmed or time.monotonic() >= self._deadline

    def _take_leave(self) -> None:
        if self._welcomed and not self._ended:
            try:
                self._query("bye")
            except BrokerUnavailable:
                return
            self._send_all()

    def _round(self, poller: zmq.Poller, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        if self._turned_away and time.monotonic() >= self._turned_away:
            self._turned_away = 0.0
            dealer.disconnect(self._address)
            dealer.connect(self._address)
        self._sleeping = True
        # Between these lines another thread may lay a frame ready: it finds us asleep then, and wakes us.
        patience = 0.0 if self._outgoing else LEAVE_TAKING if self._stopping.is_set() else SILENCE / 2
        if self._turned_away:
            patience = min(patience, KNOCK_AGAIN)
        ready = dict(poller.poll(int(patience * 1000)))
        self._sleeping = False
        if not ready and patience and not self._is_sound():
            raise OSError("the connection's own descriptors have been closed, and others opened in their place")
        if self._wakeup in ready:
            try:
                os.eventfd_read(self._wakeup)
            except BlockingIOError:
                pass
        if monitor in ready:
            event = recv_monitor_message(monitor)
            self._look(event["event"], event["value"])
        elif not self._welcomed and time.monotonic() >= self._hello_due:
            self.send_hello()
        while True:
            try:
                parts = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 2:
                self.on_frame(parts[0], parts[1])
        self._send_all()

    def _look(self, event: int, descriptor: int) -> None:
        """See who is there, and then talk to him: before the handshake there is no way to."""
        if event == zmq.EVENT_CONNECTED:
            check_address(self._address, missing_ok=True)
            check_listener(descriptor)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            # There are as many as there may be; the transport does not try again by itself.
            self._turned_away = time.monotonic() + KNOCK_AGAIN
        else:
            self.send_hello()

    def _is_sound(self) -> bool:
        """Whether we still have our descriptors: code that closes whatever is open leaves us waiting for ever."""
        try:
            os.fstat(self._wakeup)
        except OSError:
            return False
        try:
            return os.readlink(f"/proc/self/fd/{self._wakeup}") == "anon_inode:[eventfd]"
        except OSError:
            return True  # no /proc, or none that may be read

    def _send_all(self) -> None:
        outgoing = self._outgoing
        while outgoing:
            self._put(outgoing.popleft())

    def _put(self, frame: tuple[bytes, bytes, bytes]) -> None:
        try:
            self._dealer.send_multipart(frame, zmq.NOBLOCK, copy=len(frame[2]) < 65536)
        except zmq.Again:
            pass  # nobody is there: it is sent again when somebody is


def _connect(dealer: zmq.Socket[bytes], address: str) -> str:
    """Has `dealer` connect in its own time; what is wrong with the address, or nothing."""
    if "\0" in address:
        return "no file has a name with a NUL in it"  # ZeroMQ would take what is before it
    try:
        dealer.connect(address)
    except zmq.ZMQError as error:
        return zmq.strerror(error.errno or 0)
    except UnicodeEncodeError:
        return "it cannot be written as UTF-8"
    return ""
