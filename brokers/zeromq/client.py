"""A connection over a DEALER socket that one thread owns.

Other threads lay frames ready and wake it through an eventfd. The socket's own monitor tells of each (re)connect, so that
a restarted broker hears a hello at once rather than after a time-out.
"""

from __future__ import annotations

import logging
import os
import threading
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from brokers.api import Listener
from brokers.client import PeerClient
from brokers.core import wire

__all__ = ["ZmqClient"]

logger = logging.getLogger(__name__)

SILENCE = 1.0
"""Seconds after which an unanswered hello is said again."""


class ZmqClient(PeerClient):
    """Connects to `address` on construction, in a daemon thread of its own."""

    def __init__(
        self, address: str, listener: Listener, *, peer: int = 0, role: str = "client", name: str = ""
    ) -> None:
        super().__init__(listener, peer=peer, role=role, name=name)
        self._address = address
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sleeping = False
        self._stopping = threading.Event()
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name=f"broker-io-{name or self.peer}", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Wait up to `timeout` seconds for what is unconfirmed, then end the connection."""
        if self._stopping.is_set():
            return
        self._deadline = time.monotonic() + timeout
        self._stopping.set()
        os.eventfd_write(self._wakeup, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout + 1)

    def _wake(self) -> None:
        if self._sleeping:
            os.eventfd_write(self._wakeup, 1)

    def _say_hello(self) -> None:
        self._hello_due = time.monotonic() + SILENCE
        self._dealer.send_multipart(self._hello())

    def _run(self) -> None:
        context = zmq.Context()
        dealer = self._dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self.peer.to_bytes(8, "big"))
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.RCVHWM, 0)
        dealer.setsockopt(zmq.LINGER, 200)
        dealer.setsockopt(zmq.RECONNECT_IVL, 10)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 100)
        monitor = dealer.get_monitor_socket(zmq.EVENT_CONNECTED)
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        self._hello_due = float("inf")
        dealer.connect(self._address)
        try:
            while not self._finished():
                self._round(poller, dealer, monitor)
            if self._welcomed:
                with self._lock:
                    self._frame += 1
                    bye = wire.encode((self.broker_epoch, self._frame, "bye", ()))
                dealer.send_multipart((wire.QUERY, bye, b""))
        except Exception:
            logger.exception("the connection to the broker at %s has failed", self._address)
        finally:
            self._fail_all("the connection to the broker was closed")
            dealer.disable_monitor()
            monitor.close(0)
            dealer.close()
            context.term()
            os.close(self._wakeup)

    def _finished(self) -> bool:
        if not self._stopping.is_set():
            return False
        return not self._unconfirmed or time.monotonic() >= self._deadline

    def _round(self, poller: zmq.Poller, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        self._sleeping = True
        if self._outgoing:
            ready = {}
        else:
            ready = dict(poller.poll(100 if self._stopping.is_set() else 500))
        self._sleeping = False
        if self._wakeup in ready:
            try:
                os.eventfd_read(self._wakeup)
            except BlockingIOError:
                pass
        if monitor in ready:
            recv_monitor_message(monitor)
            self._say_hello()
        elif not self._welcomed and time.monotonic() >= self._hello_due:
            self._say_hello()
        while True:
            try:
                parts = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 2:
                self.said(parts[0], parts[1])
        outgoing = self._outgoing
        while outgoing:
            try:
                frame = outgoing.popleft()
            except IndexError:
                break
            dealer.send_multipart(frame, copy=len(frame[2]) < 65536)
