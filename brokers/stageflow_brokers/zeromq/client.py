"""A connection over a DEALER socket that one thread owns.

Other threads queue frames and wake the thread through an eventfd. The monitor of the socket reports each connect and
reconnect, so that a restarted broker gets a hello at once rather than after a timeout. The client must never send a
frame to a socket that another user may have created, neither at the first connect nor at any later one.
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
from stageflow_brokers.resources import shortage
from stageflow_brokers.signals import blocked_signals
from stageflow_brokers.zeromq.access import check_address, check_listener
from stageflow_brokers.zeromq.socket_path import ShortAddress, places, socket_exists

__all__ = ["ZmqClient"]

logger = logging.getLogger(__name__)

HELLO_RETRY_SECONDS = 1.0
"""Seconds after which an unanswered hello is sent again."""

RECONNECT_SECONDS = 0.3
"""Seconds after which a connection that the broker rejected is tried again."""

FIND_SECONDS = 0.5
"""Seconds without a connection after which the client looks for the socket of the broker in its other place."""

MONITORED_EVENTS = (
    zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

DESCRIPTORS = 16
"""File descriptors that a connection needs, with those of ZeroMQ."""

THREADS = 3
"""Threads of a connection, with those of ZeroMQ."""

CLOSE_CHECK_SECONDS = 0.05
"""Seconds between checks whether all frames are confirmed, while the connection closes."""


class ZmqClient(Connection):
    """A connection to the broker at `address`. The constructor connects, in a daemon thread.

    Raises `SocketNotPrivate` if other users have access to the directory of the socket, `BrokerUnavailable` if too few
    file descriptors or threads are left. The arguments are those of `Connection`.
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
        problem = shortage("a connection to the broker", descriptors=DESCRIPTORS, threads=THREADS)
        if problem:
            raise BrokerUnavailable(problem)
        self._address = address
        self._place: ShortAddress | None = None
        self._connected = False
        self._find_due = float("inf")
        self._outgoing: deque[tuple[bytes, bytes, bytes]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sleeping = False
        self._stopping = threading.Event()
        self._deadline = 0.0
        self._hello_due = float("inf")
        self._reconnect_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"broker-io-{name or self.peer}", daemon=True)
        with blocked_signals():
            self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Wait up to `timeout` seconds for unconfirmed frames, then end the connection."""
        self._deadline = time.monotonic() + timeout
        with self._lock:
            # The eventfd stays open until the connection has ended.
            if not self._end_reason and not self._stopping.is_set():
                self._stopping.set()
                os.eventfd_write(self._wakeup, 1)
        if not self.is_own_thread():
            self._thread.join(timeout + 1)

    def is_own_thread(self) -> bool:
        """True if this is the thread of the connection."""
        return threading.current_thread() is self._thread

    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        self._outgoing.append((op, header, blob))
        if self._sleeping:
            os.eventfd_write(self._wakeup, 1)

    def send_hello(self) -> None:
        self._hello_due = time.monotonic() + HELLO_RETRY_SECONDS
        hello = self._hello()
        # From here to the welcome no frame is queued, and the queued ones are sent again after it.
        self._outgoing.clear()
        self._send_frame(hello)

    def _run(self) -> None:
        context = zmq.Context()
        try:
            dealer, monitor = self._open_sockets(context)
        except zmq.ZMQError as error:  # other threads have used what the check of the constructor has found
            self.end(f"the connection to the broker cannot be opened: {error}")
            context.destroy(linger=0)
            os.close(self._wakeup)
            return
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        reason = "the connection to the broker was closed"
        try:
            problem = self._connect_to(dealer, self._address)
            if problem:
                reason = f"the broker cannot be reached at {self._address!r}: {problem}"
                return
            while not self._is_finished():
                self._round(poller, dealer, monitor)
            self._send_bye()
        except SocketNotPrivate as error:
            reason = f"the connection to the broker has been closed: {error}"
            logger.error("%s", reason)
        except Exception as error:
            reason = f"the connection to the broker has failed: {error!r}"
            logger.exception("the connection to the broker at %s has failed", self._address)
        finally:
            self.end(reason)
            dealer.disable_monitor()
            monitor.close(0)
            dealer.close()
            context.term()
            if self._place is not None:
                self._place.close()
            os.close(self._wakeup)

    def _open_sockets(self, context: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Return the DEALER socket and its monitor."""
        dealer = self._dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self.peer.to_bytes(8, "big"))
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.RCVHWM, 0)
        # Frames that were not sent when a connection breaks are sent again after the next hello, and only then.
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.LINGER, 200)
        dealer.setsockopt(zmq.RECONNECT_IVL, 10)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 100)
        return dealer, dealer.get_monitor_socket(MONITORED_EVENTS)

    def _is_finished(self) -> bool:
        if self._end_reason:
            return True
        if not self._stopping.is_set():
            return False
        return not self._unconfirmed or time.monotonic() >= self._deadline

    def _send_bye(self) -> None:
        if self._welcomed and not self._end_reason:
            try:
                self._query("bye")
            except BrokerUnavailable:
                return
            self._send_all()

    def _round(self, poller: zmq.Poller, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        if self._reconnect_at and time.monotonic() >= self._reconnect_at:
            self._reconnect_at = 0.0
            assert self._place is not None
            dealer.disconnect(self._place.text)
            dealer.connect(self._place.text)
        if not self._connected and time.monotonic() >= self._find_due:
            self._find_broker(dealer)
        self._sleeping = True
        # Between these lines another thread may queue a frame: it sees `_sleeping` then, and wakes this thread.
        timeout = 0.0 if self._outgoing else CLOSE_CHECK_SECONDS if self._stopping.is_set() else HELLO_RETRY_SECONDS / 2
        if self._reconnect_at:
            timeout = min(timeout, RECONNECT_SECONDS)
        ready = dict(poller.poll(int(timeout * 1000)))
        self._sleeping = False
        if not ready and timeout and not self._has_own_descriptors():
            raise OSError("other code has closed the file descriptors of the connection")
        if self._wakeup in ready:
            try:
                os.eventfd_read(self._wakeup)
            except BlockingIOError:
                pass
        if monitor in ready:
            event = recv_monitor_message(monitor)
            self._handle_monitor_event(event["event"], event["value"])
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

    def _handle_monitor_event(self, event: int, descriptor: int) -> None:
        """Check the peer when the connection is made, and send the hello when the handshake is complete."""
        if event == zmq.EVENT_CONNECTED:
            assert self._place is not None
            check_address(self._place.address, missing_ok=True)
            check_listener(descriptor)
            self._connected = True
        elif event == zmq.EVENT_DISCONNECTED:
            self._connected = False
            self._find_due = time.monotonic() + FIND_SECONDS
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            # The broker has too many connections. ZeroMQ does not try again automatically.
            self._reconnect_at = time.monotonic() + RECONNECT_SECONDS
        else:
            self.send_hello()

    def _connect_to(self, dealer: zmq.Socket[bytes], address: str) -> str:
        """Let `dealer` connect in the background; return the problem of the address, or an empty text."""
        if "\0" in address:
            return "a file name cannot contain a NUL"  # ZeroMQ would use the part before it
        try:
            place = ShortAddress(address)
        except OSError as error:
            return error.strerror or str(error)
        except UnicodeEncodeError:
            return "it is no file name"
        try:
            dealer.connect(place.text)
        except zmq.ZMQError as error:
            place.close()
            return zmq.strerror(error.errno or 0)
        except UnicodeEncodeError:
            place.close()
            return "it cannot be written as UTF-8"
        self._place = place
        self._find_due = time.monotonic() + FIND_SECONDS
        return ""

    def _find_broker(self, dealer: zmq.Socket[bytes]) -> None:
        """Connect to the place at which the broker listens now, if its directory was removed or replaced."""
        self._find_due = time.monotonic() + FIND_SECONDS
        last = self._place
        assert last is not None
        address = next(filter(socket_exists, places(self._address)), None)
        if address is None or (address == last.address and last.is_current()):
            return
        check_address(address, missing_ok=True)
        dealer.disconnect(last.text)
        last.close()
        if problem := self._connect_to(dealer, address):
            raise OSError(problem)

    def _has_own_descriptors(self) -> bool:
        """True if the eventfd is still open. If other code closed it, this thread would wait forever."""
        try:
            os.fstat(self._wakeup)
        except OSError:
            return False
        try:
            return os.readlink(f"/proc/self/fd/{self._wakeup}") == "anon_inode:[eventfd]"
        except OSError:
            return True  # /proc is missing or cannot be read

    def _send_all(self) -> None:
        outgoing = self._outgoing
        while outgoing:
            self._send_frame(outgoing.popleft())

    def _send_frame(self, frame: tuple[bytes, bytes, bytes]) -> None:
        try:
            self._dealer.send_multipart(frame, zmq.NOBLOCK, copy=len(frame[2]) < 65536)
        except zmq.Again:
            pass  # no broker is connected: the frame is sent again after the next hello
