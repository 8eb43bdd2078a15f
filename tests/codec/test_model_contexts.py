"""Pydantic models as contexts: round trips, when they are validated, and the texts of refusals."""

from __future__ import annotations

import enum
import re
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    RootModel,
    SecretStr,
    computed_field,
    field_serializer,
    field_validator,
    model_validator,
)

from stageflow_actors import InvalidContext, Replace, Runtime, Workflow, WorkflowDefinitionError, WorkflowStatus
from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.testing import run


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Item(BaseModel):
    sku: str
    quantity: int = Field(ge=1)


class Everything(BaseModel):
    id: str
    price: Decimal = Decimal("1.10")
    placed: datetime = datetime.fromisoformat("2024-02-29T12:00:00.123456")
    seen: datetime = datetime(2024, 2, 29, 12, 0, tzinfo=UTC)
    day: date = date(2024, 2, 29)
    wait: timedelta = timedelta(days=1, microseconds=7)
    key: UUID = UUID(int=7)
    colour: Colour = Colour.RED
    tags: set[str] = Field(default_factory=set)
    pair: tuple[int, str] = (1, "a")
    items: list[Item] = Field(default_factory=list)
    by_day: dict[date, Item] = Field(default_factory=dict)
    raw: bytes = b"\x00\xff"
    place: Path = Path("/etc/hosts")
    url: AnyUrl = AnyUrl("https://example.org/x")
    host: IPv4Address = IPv4Address("127.0.0.1")
    password: SecretStr = SecretStr("secret")
    ratio: float = 0.5
    note: str | None = None


def there_and_back(model: Any) -> Any:
    codec = ContextCodec(type(model))
    return codec.decode(codec.encode(model))


@given(
    st.builds(
        Everything,
        price=st.decimals(allow_nan=False, allow_infinity=False),
        placed=st.datetimes(),
        wait=st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=10_000)),
        tags=st.sets(st.text(max_size=3)),
        items=st.lists(st.builds(Item, sku=st.text(max_size=5), quantity=st.integers(1, 2**63)), max_size=3),
        ratio=st.floats(allow_nan=False),
        raw=st.binary(max_size=8),
    )
)
def test_a_model_comes_back_equal(model: Everything) -> None:
    assert there_and_back(model) == model


def test_nan_survives() -> None:
    copy = there_and_back(Everything(id="a", ratio=float("nan")))
    assert copy.ratio != copy.ratio


def test_aliases_computed_fields_and_extras_survive() -> None:
    class Order(BaseModel):
        model_config = ConfigDict(extra="allow", serialize_by_alias=True)
        order_id: str = Field(alias="orderId")
        parts: list[Order] = Field(default_factory=list)

        @computed_field
        def double(self) -> str:
            return self.order_id * 2

    order = Order(orderId="a", parts=[Order(orderId="b")], more=[1, 2])  # type: ignore[call-arg]
    copy = there_and_back(order)
    assert copy == order
    assert copy.more == [1, 2]
    assert ContextCodec(Order).prepare({"orderId": "a"}) == ContextCodec(Order).encode(Order(orderId="a"))


def test_a_strict_model_still_comes_back_and_is_strict_with_what_users_give() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True)
        at: datetime
        price: Decimal
        tags: set[int]

    codec = ContextCodec(Strict)
    model = Strict(at=datetime.fromisoformat("2024-01-01"), price=Decimal("1.50"), tags={1})
    assert codec.decode(codec.encode(model)) == model
    with pytest.raises(InvalidContext, match=r"context\.at: Input should be a valid datetime"):
        codec.prepare({"at": "2024-01-01", "price": Decimal(1), "tags": {1}})
    assert codec.prepare({"at": "2024-01-01T00:00:00", "price": "1.50", "tags": [1]}, strict=False) == codec.encode(
        model
    )


class Checked(BaseModel):
    name: Annotated[str, AfterValidator(str.strip)] = "x"
    low: int = 0
    high: int = 10
    items: list[Item] = Field(default_factory=list)

    @field_validator("name")
    @classmethod
    def _not_empty(cls, name: str) -> str:
        if not name:
            raise ValueError("a name is needed")
        return name

    @model_validator(mode="after")
    def _in_order(self) -> Checked:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


@pytest.mark.parametrize(
    ("context", "message", "field"),
    [
        ({"name": " "}, "context.name: a name is needed", "name"),
        ({"items": [{"sku": "a"}]}, "context.items[0].quantity is missing: Checked requires it", "items[0].quantity"),
        (
            {"items": [{"sku": "a", "quantity": 0}, {"sku": 1, "quantity": 1}]},
            "context.items[0].quantity: Input should be greater than or equal to 1 (and 1 more)",
            "items[0].quantity",
        ),
        ({"low": 11}, "context: low is above high", None),
        (
            [1],
            "the context must be Checked or a dict with its fields, not list: [1]; submit_many and map take more",
            None,
        ),
    ],
)
def test_what_a_validator_refuses_is_refused_at_the_door_by_its_field(
    context: Any, message: str, field: str | None
) -> None:
    with pytest.raises(InvalidContext) as caught:
        ContextCodec(Checked).prepare(context)
    text, _, place = str(caught.value).rpartition(" (")
    assert (text, caught.value.field) == (message, field)
    assert re.fullmatch(r".*test_model_contexts\.py, line \d+\)", place)


def test_what_a_handler_leaves_that_no_validator_takes_is_the_failure_of_its_stage() -> None:
    def break_it(context: Checked) -> None:
        context.low = 99

    result = run(Workflow("w", context=Checked).add_stage(break_it), Checked())
    assert result.error == "InvalidContext: stage 'break-it': context: low is above high"


class Hidden(BaseModel):
    left_out: int = Field(default=0, exclude=True)
    shown: Any = None
    text: str = ""
    _private: int = PrivateAttr(default=0)

    @field_serializer("text")
    def _shorten(self, text: str) -> str:
        return text[:3]


def hidden(**changes: Any) -> Hidden:
    model = Hidden()
    for name, value in changes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (hidden(left_out=1), "context.left_out is 1 and is decoded as 0"),
        (hidden(_private=1), "context._private is 1 and is decoded as 0"),
        (hidden(text="abcd"), "context.text is 'abcd' and is decoded as 'abc'"),
        (hidden(shown={1, 2}), "context.shown is a set and is decoded as a list"),
        (hidden(shown=[{"f": object()}]), "context.shown[0].f is an object, which cannot be serialised"),
        (hidden(shown=2**70), "context.shown is an integer beyond 64 bits"),
        (hidden(text=7), "context cannot be serialised (Error calling function `_shorten`"),
    ],
)
def test_what_would_not_come_back_equal_is_refused_by_field(model: Hidden, message: str) -> None:
    with pytest.raises(InvalidContext) as caught:
        ContextCodec(Hidden).encode(model, stage="pay")
    assert str(caught.value).startswith("stage 'pay': " + message)


def test_a_subclass_is_refused_because_what_it_adds_would_be_lost() -> None:
    class More(Item):
        extra: int = 1

    with pytest.raises(InvalidContext, match="not its subclass More"):
        ContextCodec(Item).prepare(More(sku="a", quantity=1))


def test_a_validate_method_of_the_users_is_asked_and_that_of_pydantic_is_not() -> None:
    class Own(BaseModel):
        n: int = 0

        def validate(self) -> None:  # type: ignore[override]
            if self.n < 0:
                raise ValueError("n is negative")

    with pytest.raises(InvalidContext, match="n is negative"):
        ContextCodec(Own).prepare({"n": -1})
    ContextCodec(Item).prepare({"sku": "a", "quantity": 1})


def test_equal_models_have_one_digest_whatever_the_order_of_their_sets() -> None:
    codec = ContextCodec(Everything)
    one = msgspec.msgpack.decode(codec.encode(Everything(id="a", tags={"x", "y", "z"})))
    other = {**one, "tags": list(reversed(one["tags"]))}
    assert codec.digest(msgspec.msgpack.encode(one)) == codec.digest(msgspec.msgpack.encode(other))
    assert codec.digest(codec.encode(Everything(id="a"))) != codec.digest(codec.encode(Everything(id="b")))


def test_a_root_model_has_no_fields_and_is_no_context() -> None:
    class Names(RootModel[list[str]]):
        pass

    with pytest.raises(WorkflowDefinitionError, match="not the class Names"):
        Workflow("w", context=Names)


def test_the_fields_of_a_model_are_part_of_the_fingerprint() -> None:
    def made(**fields: Any) -> str:
        kind = type("Order", (BaseModel,), {"__annotations__": fields, "__module__": __name__})
        return Workflow("w", context=kind).add_stage(lambda order: None).fingerprint()

    assert made(a=int) != made(a=int, b=int)


def test_a_handler_may_return_a_new_model() -> None:
    result = run(
        Workflow("w", context=Item)
        .add_stage(lambda item: item.model_copy(update={"quantity": 2}))
        .add_stage(lambda item: Replace(Item(sku="b", quantity=item.quantity + 1))),
        {"sku": "a", "quantity": "1"},
    )
    assert result.context == Item(sku="b", quantity=3)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)
    kind: Literal["frozen"] = "frozen"
    left: int = 0
    right: int = 0


def test_models_run_through_worker_processes_and_branches_merge_by_field(tmp_path: Path) -> None:
    def left(context: Frozen) -> Frozen:
        return context.model_copy(update={"left": 1})

    def right(context: Frozen) -> Frozen:
        return context.model_copy(update={"right": 2})

    workflow = Workflow("w", context=Frozen).add_parallel("both", [left, right])
    with Runtime(workflow, data_dir=tmp_path / "data") as runtime:
        result = runtime.execute(workflow, {"left": 0}, timeout=20)
        with pytest.raises(InvalidContext, match=r"context\.left: Input should be a valid integer"):
            runtime.submit(workflow, {"left": "many"})
    assert (result.status, result.context) == (WorkflowStatus.completed, Frozen(left=1, right=2))


SCRIPT = """
from __future__ import annotations

from pydantic import BaseModel, Field
from stageflow_actors import Runtime, Workflow


class Part(BaseModel):
    n: int = Field(gt=0)


class Order(BaseModel):
    parts: list[Part] = Field(default_factory=list)
    next: Order | None = None


orders = Workflow("orders", context=Order)


@orders.stage
def add(order: Order) -> None:
    order.parts.append(Part(n=len(order.parts) + 1))
    order.next = Order()


if __name__ == "__main__":
    with Runtime(orders, data_dir="data") as runtime:
        print(runtime.execute(orders, Order(parts=[Part(n=5)])).context)
"""


def test_a_model_of_a_script_needs_no_module(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, "utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "parts=[Part(n=5), Part(n=2)] next=Order(parts=[], next=None)\n"


def test_nothing_imports_pydantic_where_no_context_needs_it() -> None:
    code = (
        "import sys, stageflow_actors, stageflow_actors.testing as t\n"
        "t.run(stageflow_actors.Workflow('w').add_stage(lambda c: None), {})\n"
        "assert 'pydantic' not in sys.modules and 'httpx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
