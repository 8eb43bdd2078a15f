"""A travel agency: flight, hotel and car are booked at the same time, or not at all.

    python examples/travel_saga.py

The hotel is booked over HTTP, at a small server that this program starts on a free local port and that fails every
third request; flights and cars are in a SQLite file. Each booking is made under the stage's idempotency key, so that a
repeated request books once. If one booking fails, the others are cancelled. At the end an audit compares the bookings
with the completed trips.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

from stageflow_actors import Breaker, Compensation, Retry, Runtime, Stage, StageContext, StageError, Workflow

ROOMS = {"Oslo": 120, "Rome": 90, "Kyoto": 210}
"""The price of a night; the hotel has no other places."""

SEATS = {"Oslo": 180, "Rome": 140, "Kyoto": 890, "Atlantis": 20}
CARS = {"Oslo": 60, "Rome": 35, "Atlantis": 5}
"""The price per day; Kyoto has no cars."""


@dataclass
class Trip:
    """The context: the request for a trip, and its bookings so far."""

    trip_id: str
    place: str
    nights: int
    budget: int
    flight: str | None = None
    hotel: str | None = None
    car: str | None = None
    flight_price: int = 0
    hotel_price: int = 0
    car_price: int = 0

    def validate(self) -> None:
        if self.place not in SEATS:
            raise ValueError(f"there are no flights to {self.place}, only to {', '.join(SEATS)}")
        if not 1 <= self.nights <= 30:
            raise ValueError(f"nights must be from 1 to 30, not {self.nights}")

    @property
    def total(self) -> int:
        return self.flight_price + self.hotel_price + self.car_price


class Desk:
    """Bookings of flights and cars; each key books once."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
        self._db.execute("CREATE TABLE IF NOT EXISTS bookings (key PRIMARY KEY, trip, kind, cancelled DEFAULT 0)")

    def book(self, key: str, trip: str, kind: str) -> str:
        self._db.execute("INSERT OR IGNORE INTO bookings (key, trip, kind) VALUES (?, ?, ?)", (key, trip, kind))
        [(number,)] = self._db.execute("SELECT rowid FROM bookings WHERE key = ?", (key,))
        return f"{kind}-{number}"

    def cancel(self, booking: str) -> None:
        self._db.execute("UPDATE bookings SET cancelled = 1 WHERE rowid = ?", (booking.rpartition("-")[2],))

    def trips(self) -> dict[str, list[str]]:
        """Return the kinds of bookings of each trip that are not cancelled."""
        found: dict[str, list[str]] = {}
        for trip, kind in self._db.execute("SELECT trip, kind FROM bookings WHERE NOT cancelled ORDER BY kind"):
            found.setdefault(trip, []).append(kind)
        return found

    def close(self) -> None:
        self._db.close()


def book_flight(trip: Trip, ctx: StageContext, *, desk: Desk) -> None:
    trip.flight = desk.book(ctx.idempotency_key, trip.trip_id, "flight")
    trip.flight_price = SEATS[trip.place]


def cancel_flight(trip: Trip, *, desk: Desk) -> None:
    if trip.flight is not None:
        desk.cancel(trip.flight)
        trip.flight = None


def rent_car(trip: Trip, ctx: StageContext, *, desk: Desk) -> None:
    if trip.place not in CARS:
        raise StageError(f"no car is available in {trip.place}")
    trip.car = desk.book(ctx.idempotency_key, trip.trip_id, "car")
    trip.car_price = CARS[trip.place] * trip.nights


def return_car(trip: Trip, *, desk: Desk) -> None:
    if trip.car is not None:
        desk.cancel(trip.car)
        trip.car = None


def note_hotel(trip: Trip, response: dict[str, Any]) -> None:
    trip.hotel, trip.hotel_price = response["id"], response["price"]


def within_budget(trip: Trip) -> None:
    if trip.total > trip.budget:
        raise StageError(f"the trip costs {trip.total}, the budget is {trip.budget}")


def travel(hotel_url: str) -> Workflow[Trip]:
    """Return the workflow, for a hotel at this address."""
    hotel = Stage.http(
        "hotel",
        url=f"{hotel_url}/bookings",
        request=lambda trip: {"trip": trip.trip_id, "place": trip.place, "nights": trip.nights},
        on_response=note_hotel,
        timeout=5,
        retry=Retry.exponential(max_attempts=6, initial=0.05, maximum=2),  # of 5xx and of a network that fails
        breaker=Breaker(failures=20, reset=1),
        compensation=Compensation.http(lambda trip: f"{hotel_url}/bookings/{trip.hotel}", method="DELETE"),
    )
    return (
        Workflow("travel", context=Trip)
        .add_parallel(
            "bookings",
            [
                Stage(book_flight, compensation=cancel_flight),
                hotel,
                Stage(rent_car, compensation=return_car),
            ],
        )
        .add_stage(within_budget)
    )


class Hotel(BaseHTTPRequestHandler):
    """The hotel's web service; every third request fails with 503."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    rooms: dict[str, dict[str, Any]]
    requests: int

    def do_POST(self) -> None:
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            if self._unavailable():
                return
            if wish["place"] not in ROOMS:
                self._answer(409, {"error": f"no hotel in {wish['place']}"})
                return
            # A repeated key returns the room booked with it.
            known = [id for id, room in self.rooms.items() if room["key"] == self.headers["Idempotency-Key"]]
            number = known[0] if known else f"room-{len(self.rooms) + 1}"
            self.rooms[number] = {"trip": wish["trip"], "key": self.headers["Idempotency-Key"], "booked": True}
            self._answer(201, {"id": number, "price": ROOMS[wish["place"]] * wish["nights"]})

    def do_DELETE(self) -> None:
        with self.lock:
            room = self.rooms.get(self.path.rpartition("/")[2])
            if room is None:
                self._answer(404, {"error": "no such booking"})
            else:
                room["booked"] = False
                self._answer(204, None)

    def _unavailable(self) -> bool:
        type(self).requests += 1
        if self.requests % 3:
            return False
        self._answer(503, {"error": "temporarily unavailable"})
        return True

    def _answer(self, status: int, value: Any) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextmanager
def open_hotel() -> Iterator[tuple[str, type[Hotel]]]:
    """Serve a hotel during the block; yield its address and its books."""
    kind = type("ThisHotel", (Hotel,), {"rooms": {}, "requests": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", kind
        finally:
            server.shutdown()
            thread.join()


def trips(count: int) -> Iterator[Trip]:
    """Yield requests: most succeed; Kyoto has no cars, Atlantis has no hotel, and some trips exceed the budget."""
    for number in range(count):
        place = list(SEATS)[number % len(SEATS)]
        yield Trip(f"TRIP-{number + 1}", place, nights=1 + number % 4, budget=450 if number % 5 else 200)


@click.command()
@click.option("--trips", "count", default=20, show_default=True, help="Number of trips.")
def main(count: int) -> None:
    """Book trips, each completely or not at all: flight, hotel (over HTTP) and car at the same time."""
    with tempfile.TemporaryDirectory() as folder, open_hotel() as (url, hotel):
        books = Path(folder, "desk.db")
        workflow = travel(url)
        completed = set()
        with Runtime(workflow, data_dir=Path(folder, "cluster"), services={"desk": lambda: Desk(books)}) as runtime:
            for result in runtime.map(workflow, trips(count)):
                trip = result.context
                assert trip is not None
                outcome = (
                    f"{trip.flight}, {trip.hotel}, {trip.car} for {trip.total}" if result.success else result.error
                )
                click.echo(f"{trip.trip_id:<8} {trip.place:<9} {result.status.value:<12} {outcome}")
                if result.success:
                    completed.add(trip.trip_id)
        click.echo()
        for line in audit(books, hotel, completed):
            click.echo(line)


def audit(books: Path, hotel: type[Hotel], completed: set[str]) -> Iterator[str]:
    """Compare the books of desk and hotel with the completed trips. Raises `SystemExit` if they differ."""
    with closing(Desk(books)) as desk:
        booked = desk.trips()
    rooms = [room["trip"] for room in hotel.rooms.values() if room["booked"]]
    whole = {trip for trip, kinds in booked.items() if kinds == ["car", "flight"]}
    yield f"{len(completed)} trips completed; {len(rooms)} rooms, {len(booked)} flights and cars are booked"
    yield f"the hotel received {hotel.requests} requests, and failed {hotel.requests // 3} of them"
    if not (completed == whole == set(booked) == set(rooms) and len(rooms) == len(completed)):
        raise SystemExit("the books do not agree")
    yield "the books agree: each trip is booked completely or not at all"


if __name__ == "__main__":
    main()
