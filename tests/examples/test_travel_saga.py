"""The travel example: all of a trip is booked or nothing, and the program's own audit says so."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import travel_saga
from stageflow_actors import InvalidContext, WorkflowResult
from stageflow_actors.testing import run
from travel_saga import Desk, Trip

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "travel_saga.py"


def test_the_example_books_trips_and_its_books_agree(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "--trips", "16"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[-1] == "the books agree: each trip is booked completely or not at all"
    by_trip = {line.split()[0]: line for line in lines if line.startswith("TRIP-")}
    assert len(by_trip) == 16
    assert "completed" in by_trip["TRIP-2"]
    assert "no car is available in Kyoto" in by_trip["TRIP-3"]
    assert '409 Conflict: {"error": "no hotel in Atlantis"}' in by_trip["TRIP-4"]
    assert "the budget is" in by_trip["TRIP-1"]
    assert re.search(r"^the hotel received \d+ requests, and failed \d+ of them$", ran.stdout, re.MULTILINE)
    assert not any(tmp_path.iterdir())


def book(tmp_path: Path, trip: Trip) -> tuple[WorkflowResult[Trip], list[str], dict[str, list[str]]]:
    path = tmp_path / "desk.db"
    with closing(Desk(path)) as desk, travel_saga.open_hotel() as (url, hotel):
        result = run(travel_saga.travel(url), trip, services={"desk": desk})
        rooms = [room["trip"] for room in hotel.rooms.values() if room["booked"]]
        return result, rooms, desk.trips()


def test_a_trip_that_can_be_had_is_booked_whole(tmp_path: Path) -> None:
    result, rooms, booked = book(tmp_path, Trip("T", "Rome", 2, 1000))
    assert result.success
    assert result.context is not None
    assert result.context.total == 140 + 2 * 90 + 2 * 35
    assert (rooms, booked) == (["T"], {"T": ["car", "flight"]})


@pytest.mark.parametrize(
    ("trip", "failed_stage"),
    [
        (Trip("T", "Kyoto", 1, 10_000), "rent-car"),
        (Trip("T", "Atlantis", 1, 10_000), "hotel"),
        (Trip("T", "Oslo", 3, 100), "within-budget"),
    ],
)
def test_a_trip_that_cannot_be_had_leaves_nothing_booked(trip: Trip, failed_stage: str, tmp_path: Path) -> None:
    result, rooms, booked = book(tmp_path, trip)
    assert result.status.value == "compensated"
    assert result.failed_stage == failed_stage
    assert all(undone.status.value == "completed" for undone in result.compensations)
    assert (rooms, booked) == ([], {})


def test_asking_the_hotel_twice_with_one_key_books_one_room(tmp_path: Path) -> None:
    import httpx

    with travel_saga.open_hotel() as (url, hotel), httpx.Client(trust_env=False) as client:
        wish = {"trip": "T", "place": "Oslo", "nights": 1}
        answers = [client.post(f"{url}/bookings", json=wish, headers={"Idempotency-Key": "k"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 201, 503]
    assert answers[0].json() == answers[1].json()
    assert len(hotel.rooms) == 1


@pytest.mark.parametrize("trip", [Trip("T", "Nowhere", 1, 1), Trip("T", "Oslo", 0, 1)])
def test_a_wish_that_makes_no_sense_is_refused_at_the_door(trip: Trip) -> None:
    with pytest.raises(InvalidContext):
        run(travel_saga.travel("http://127.0.0.1:1"), trip, services={"desk": lambda: None})


def test_its_help_describes_it() -> None:
    ran = subprocess.run([sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, check=True)
    assert "each completely or not at all" in ran.stdout
