"""Errors have fields, and keep them between processes."""

import copy
import pickle

import pytest

from stageflow_brokers import errors

EXAMPLES = [
    errors.BrokerError("m"),
    errors.JournalError("m"),
    errors.JournalCorrupt("m", file="f", offset=3, reason="r"),
    errors.JournalLocked("m", path="p", pid=4),
    errors.JournalLocked("m", path="p", pid=None),
    errors.JournalVersion("m", file="f", found=2, supported=1),
    errors.JournalFull("m", needed=5),
    errors.JournalFailed("m"),
    errors.BrokerUnavailable("m"),
    errors.QueueFull("m", queue="q", limit=6),
    errors.PayloadTooLarge("m", size=8, limit=7),
    errors.ProtocolError("m"),
    errors.SocketNotPrivate("m", path="p"),
    errors.Refused("m"),
    errors.StorageFull("m"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("carry", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_an_error_arrives_with_its_message_and_all_its_fields(error: errors.BrokerError, carry: object) -> None:
    assert callable(carry)
    again = carry(error)
    assert type(again) is type(error)
    assert str(again) == "m"
    assert vars(again) == vars(error)


def test_every_error_has_an_example_and_a_place_in_the_tree_that_is_drawn() -> None:
    assert {type(error).__name__ for error in EXAMPLES} == set(errors.__all__)
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert name in errors.__doc__
        assert issubclass(getattr(errors, name), errors.BrokerError)


def test_subclasses_elsewhere_keep_their_fields_too() -> None:
    class Local(errors.Refused):
        def __init__(self, message: str, *, stage: str) -> None:
            super().__init__(message)
            self.stage = stage

    again = copy.copy(Local("m", stage="s"))
    assert (str(again), again.stage) == ("m", "s")
