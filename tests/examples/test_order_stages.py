"""The stages of the order example, called directly: that is what decorated functions stay good for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

import order_processing
from order_processing import Item, Order
from shop import Address, CardDeclined, Shop
from shop_audit import read_json_lines

ORDERS = Path(order_processing.__file__).with_name("orders.jsonl")


@dataclass
class FakeContext:
    """What the stages of the example ask of a `StageContext`."""

    idempotency_key: str = "key"
    results: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def order() -> Order:
    home = Address("Ida Koch", "Lindenallee 4", "10115", "Berlin", "DE")
    items = [Item("TEA", 1), Item("POT", 1), Item("TEA", 2)]
    return Order("O-1", "C-1", items, home, "tok_good", datetime(2024, 9, 16, tzinfo=UTC))


def run_all(order: Order, shop: Shop) -> FakeContext:
    ctx: Any = FakeContext()
    order_processing.validate(order, shop=shop)
    order_processing.price(order, shop=shop)
    ctx.results["reserve-inventory"] = order_processing.reserve_inventory(order, ctx, shop=shop)
    ctx.results["pay"] = order_processing.pay(order, ctx, shop=shop)
    ctx.results["ship"] = order_processing.ship(order, ctx, shop=shop)
    order_processing.confirm(order, ctx, shop=shop)
    return ctx  # type: ignore[no-any-return]


def test_the_stages_fill_in_what_they_find_out(order: Order, shop: Shop) -> None:
    run_all(order, shop)
    assert order.total == 3 * 450 + 6490
    assert order.tracking == "DE000000001"


def test_a_saga_that_is_run_again_leaves_the_shop_as_it_was(order: Order, shop: Shop) -> None:
    again = replace(order)
    first, second = run_all(order, shop), run_all(again, shop)
    assert first.results == second.results
    assert order == again
    assert shop.reserve("other", "O-2", {"TEA": 7, "POT": 1})


def test_the_compensations_undo_all_of_it(order: Order, shop: Shop) -> None:
    ctx: Any = run_all(order, shop)
    for _ in range(2):  # the second time as after a crash
        order_processing.cancel_parcel(order, ctx, shop=shop)
        order_processing.refund(order, ctx, shop=shop)
        order_processing.release_inventory(order, ctx, shop=shop)
    assert order.tracking is None
    assert order.undone[:3] == ["ship", "pay", "reserve-inventory"]
    assert shop.reserve("other", "O-2", {"TEA": 10, "POT": 2})


def test_a_declined_card_is_reported_by_its_stage(order: Order, shop: Shop) -> None:
    order.card, order.total = "tok_bad", 100
    ctx: Any = FakeContext()
    with pytest.raises(CardDeclined, match="card expired"):
        order_processing.pay(order, ctx, shop=shop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order_id": ""}, "order_id is empty"),
        ({"items": []}, "no items"),
        ({"items": [Item("TEA", 0)]}, "0 pieces of TEA"),
        ({"items": [Item("TEA", 1), Item("POT", 100)]}, "100 pieces of POT"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_at_the_door(
    change: dict[str, Any], message: str, order: Order
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(order, **change).validate()


def test_the_stages_and_what_undoes_them_are_those_of_the_specification() -> None:
    stages = order_processing.orders.stages
    assert [stage.id for stage in stages] == ["validate", "price", "reserve-inventory", "pay", "ship", "confirm"]
    assert [stage.id for stage in stages if stage.compensation] == ["reserve-inventory", "pay", "ship"]


def test_each_order_of_the_file_is_one() -> None:
    lines = read_json_lines(ORDERS)
    for line in lines:
        msgspec.convert(line, Order).validate()
    assert len({line["order_id"] for line in lines}) == len(lines) == 2000


def test_the_shop_is_where_the_environment_variable_points(shop_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_DB", str(shop_db))
    shop = order_processing.open_shop()
    assert shop.email_of("C-1") == "ida@example.org"
    shop.close()
