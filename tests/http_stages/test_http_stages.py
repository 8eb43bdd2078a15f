"""HTTP stages against a real server: the request, the accepted answer, and the meaning of each status."""

from __future__ import annotations

import enum
import gzip
import math
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Server, drip, flood, hang_up, keep_silent, raw, reply, stop_halfway

from stageflow_actors import (
    Compensation,
    Retry,
    Runtime,
    Stage,
    StageTimeout,
    Workflow,
    WorkflowDefinitionError,
    WorkflowResult,
    WorkflowStatus,
)
from stageflow_actors.definition import http
from stageflow_actors.testing import run


@dataclass
class Order:
    id: str = "A 1/2"
    amount: int = 250
    charge: str | None = None
    city: dict[str, str] = field(default_factory=lambda: {"zip": "10115"})


def charge(url: Any, **options: Any) -> Workflow[Order]:
    return Workflow("orders", context=Order).add_http_stage("charge", url=url, **options)


def failed(result: WorkflowResult[Any]) -> str:
    assert result.status == WorkflowStatus.failed
    assert result.error is not None
    return result.error


# what is sent and taken in


def test_the_request_goes_out_as_json_with_the_idempotency_key_and_the_json_that_comes_back_is_the_result(
    server: Server,
) -> None:
    url = server.on("/charges", reply(201, {"id": "ch_1"}))
    result = run(charge(url, request=lambda order: {"amount": order.amount}), Order())
    assert result.status == WorkflowStatus.completed
    assert result.stages[0].data == {"id": "ch_1"}
    [(method, path, headers, body)] = server.asked
    assert (method, path, body) == ("POST", "/charges", {"amount": 250})
    assert headers["idempotency-key"] == f"orders:{result.instance_id}:charge"
    assert headers["content-type"] == headers["accept"] == "application/json"


def test_on_response_takes_the_answer_in(server: Server) -> None:
    def take(order: Order, response: Any) -> str:
        order.charge = response["id"]
        return "taken"

    result = run(charge(server.on("/", reply(200, {"id": "ch_1"})), on_response=take), Order())
    assert result.context is not None
    assert result.context.charge == "ch_1"
    assert result.stages[0].data == "taken"


def test_on_response_may_replace_the_context(server: Server) -> None:
    url = server.on("/", reply(200, {"id": "ch_1"}))
    result = run(charge(url, on_response=lambda order, response: Order(charge=response["id"])), Order(amount=1))
    assert result.context == Order(charge="ch_1")


def test_an_error_of_on_response_is_the_failure_of_the_stage(server: Server) -> None:
    url = server.on("/", reply(200, {}))
    assert failed(run(charge(url, on_response=lambda order, response: response["id"]), Order())) == "KeyError: 'id'"


def test_fields_of_the_context_go_into_the_url_and_cannot_change_where_it_leads(server: Server) -> None:
    run(charge(server.url + "/orders/{id}/{city.zip}?amount={amount}&v={{1}}", method="GET"), Order())
    run(charge(server.url + "/orders/{id}", method="GET"), Order(id="../admin?x=1#"))
    assert [asked[1] for asked in server.asked] == [
        "/orders/A%201%2F2/10115?amount=250&v={1}",
        "/orders/..%2Fadmin%3Fx%3D1%23",
    ]


@pytest.mark.parametrize("value", ["", ".", ".."])
def test_a_field_that_would_make_another_path_is_refused(value: str, server: Server) -> None:
    assert "would change the path of the url" in failed(
        run(charge(server.url + "/orders/{id}/cancel"), Order(id=value))
    )
    assert server.asked == []


def test_a_field_that_is_none_is_refused(server: Server) -> None:
    error = failed(run(charge(server.url + "/orders/{charge}"), Order()))
    assert error == "StageError: the url needs charge, which is None"


def test_a_dict_context_without_the_field_names_it(server: Server) -> None:
    workflow = Workflow("plain").add_http_stage("get", url=server.url + "/{sku}", method="get")
    assert failed(run(workflow, {})) == "StageError: the url needs sku, which the context does not have"
    known = failed(run(workflow, {"sku": "TEA"}))
    assert known == f'StageError: GET {server.url}/TEA answered 404 Not Found: {{"error": "nothing at /TEA"}}'


def test_the_url_may_be_a_function_of_the_context(server: Server) -> None:
    base = server.url
    server.on("/eu/charges", reply(200, 1))
    assert run(charge(lambda order: f"{base}/eu/charges"), Order()).stages[0].data == 1
    assert "must be a string that begins with http://" in failed(run(charge(lambda order: "ftp://x"), Order()))


def test_headers_are_a_dict_or_a_function_of_the_context(server: Server) -> None:
    url = server.on("/", reply(200))
    run(charge(url, headers={"Authorization": "Bearer t", "idempotency-key": "mine"}), Order())
    run(charge(url, headers=lambda order: {"X-Order": order.id}), Order())
    assert server.asked[0][2]["authorization"] == "Bearer t"
    assert server.asked[0][2]["idempotency-key"] == "mine"
    assert server.asked[1][2]["x-order"] == "A 1/2"


def test_an_id_with_letters_that_no_header_can_hold_still_makes_a_key(server: Server, tmp_path: Path) -> None:
    url = server.on("/", reply(200))
    with Runtime(charge(url), data_dir=tmp_path / "data") as runtime:
        runtime.execute("orders", Order(), instance_id="Müller 100%", timeout=20)
    assert server.asked[0][2]["idempotency-key"] == "orders:M%C3%BCller%20100%25:charge"


@pytest.mark.parametrize("status", [200, 202, 204])
def test_an_answer_without_a_body_is_none(status: int, server: Server) -> None:
    assert run(charge(server.on("/", raw(status, b""))), Order()).stages[0].data is None


def test_a_compressed_answer_is_read(server: Server) -> None:
    url = server.on("/", raw(200, gzip.compress(b"[1, 2]"), content_encoding="gzip"))
    assert run(charge(url), Order()).stages[0].data == [1, 2]


class Colour(enum.Enum):
    RED = "red"


def test_what_has_a_json_form_is_sent_in_it(server: Server) -> None:
    url = server.on("/", reply(200))
    key = uuid.UUID(int=7)
    run(charge(url, request=lambda order: {"order": order, "colour": Colour.RED, "key": key, "pair": (1, 2)}), Order())
    assert server.asked[0][3] == {
        "order": {"id": "A 1/2", "amount": 250, "charge": None, "city": {"zip": "10115"}},
        "colour": "red",
        "key": str(key),
        "pair": [1, 2],
    }


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (lambda order: {"rate": [math.nan]}, "NaN or infinity"),
        (lambda order: {"rate": None, "most": math.inf}, "NaN or infinity"),
        (lambda order: {"price": Decimal("1.10")}, "not JSON serializable: decimal.Decimal"),
        (lambda order: {1, 2}, "not JSON serializable: set"),
    ],
)
def test_what_has_no_json_form_is_an_error_and_nothing_is_sent(
    request_: Callable[[Order], Any], why: str, server: Server
) -> None:
    assert why in failed(run(charge(server.on("/", reply(200)), request=request_), Order()))
    assert server.asked == []


def test_cookies_of_one_instance_are_not_sent_with_the_next(server: Server) -> None:
    workflow = charge(server.on("/", reply(200, None, set_cookie="session=1; Path=/")))
    run(workflow, Order())
    run(workflow, Order())
    assert ["cookie" in asked[2] for asked in server.asked] == [False, False]


# what each kind of answer means

RETRY = Retry.fixed(max_attempts=3, delay=0)


@pytest.mark.parametrize("bad", [reply(500), reply(503), reply(429), hang_up, stop_halfway])
def test_what_may_pass_is_tried_again(bad: Any, server: Server) -> None:
    url = server.on("/", bad, reply(200, "ok"))
    result = run(charge(url, retry=RETRY), Order())
    assert result.status == WorkflowStatus.completed
    assert (result.stages[0].attempts, result.stages[0].data) == (2, "ok")
    keys = {asked[2]["idempotency-key"] for asked in server.asked}
    assert len(server.asked) == 2
    assert len(keys) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 300, 304])
def test_any_other_answer_is_final(status: int, server: Server) -> None:
    url = server.on("/", raw(status, b""))
    assert f"answered {status}" in failed(run(charge(url, retry=RETRY), Order()))
    assert len(server.asked) == 1


def test_the_error_shows_the_beginning_of_the_answer_and_no_query_string(server: Server) -> None:
    url = server.on("/charges", raw(402, b"card\n  declined " + b"x" * 1000))
    error = failed(run(charge(url + "?token=secret"), Order()))
    assert error.startswith(f"StageError: POST {url} answered 402 Payment Required: card declined xxx")
    assert error.endswith("xxx…")
    assert len(error) < 400
    assert "secret" not in error


@pytest.mark.parametrize("status", [402, 500, 302, None])
def test_no_error_shows_user_password_or_query_of_a_url(status: int | None, server: Server) -> None:
    url = server.on(
        "/charges",
        keep_silent if status is None else raw(status, b"", location="http://u:secret@else.where/p?secret"),
    )
    private = url.replace("http://", "http://ann:secret@")
    result = run(charge(lambda order: private + "?token=secret#secret", timeout=0.2), Order())
    assert url in failed(result)
    assert "secret" not in repr(result)
    assert "ann" not in repr(result)


@pytest.mark.parametrize(
    "url", ["http://ann:secret@127.0.0.1:1/x?token=secret", "ftp://ann:secret@h/?secret", "http://ann:secret/1@h/"]
)
def test_what_cannot_be_asked_is_named_without_user_password_and_query(url: str) -> None:
    assert "secret" not in failed(run(charge(lambda order: url), Order()))


def test_a_server_that_is_not_there_is_tried_again_and_then_named(server: Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        result = run(charge(url, retry=RETRY), Order())
    assert result.stages[0].attempts == 3
    assert f"POST {url} failed: " in failed(result)


@pytest.mark.parametrize("slow", [keep_silent, drip])
def test_a_server_that_takes_too_long_is_a_timeout_which_the_policy_sees(slow: Any, server: Server) -> None:
    url = server.on("/", slow)
    result = run(charge(url, timeout=0.2, retry=Retry.fixed(2, 0, retry_on=StageTimeout)), Order())
    assert result.stages[0].attempts == 2
    assert failed(result).startswith(f"StageTimeout: POST {url}")


def test_an_answer_that_is_no_json_is_final_and_shown(server: Server) -> None:
    url = server.on("/", raw(200, b"<html>Welcome to the hotel", content_type="text/html"))
    error = failed(run(charge(url, retry=RETRY), Order()))
    assert error == f"StageError: POST {url} answered 200 with no JSON (text/html): <html>Welcome to the hotel"
    assert len(server.asked) == 1


@pytest.mark.parametrize("huge", [flood, raw(200, b"7" * (11 << 20))], ids=["not announced", "announced"])
def test_a_body_that_is_too_large_is_not_read(huge: Any, server: Server) -> None:
    assert "10,485,760" in failed(run(charge(server.on("/", huge), retry=RETRY), Order()))
    assert len(server.asked) == 1


def test_a_body_that_unpacks_to_too_much_is_not_kept(server: Server) -> None:
    url = server.on("/", raw(200, gzip.compress(b"7" * (64 << 20)), content_encoding="gzip"))
    assert "10,485,760" in failed(run(charge(url), Order()))


def test_a_body_that_cannot_be_unpacked_is_final(server: Server) -> None:
    url = server.on("/", raw(200, b"not gzip", content_encoding="gzip"))
    assert "cannot be decoded" in failed(run(charge(url, retry=RETRY), Order()))
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_within_the_server_that_keeps_the_method_is_followed(status: int, server: Server) -> None:
    server.on("/new", reply(200, "ok"))
    url = server.on("/old", reply(status, None, location="/new"))
    assert run(charge(url, request=lambda order: {"n": 1}), Order()).stages[0].data == "ok"
    assert [(asked[0], asked[3]) for asked in server.asked] == [("POST", {"n": 1})] * 2
    assert server.asked[1][2]["idempotency-key"]


def test_a_post_answered_with_see_other_is_followed_by_a_get(server: Server) -> None:
    server.on("/receipt", reply(200, "ok"))
    result = run(charge(server.on("/pay", reply(303, None, location="/receipt"))), Order())
    assert result.stages[0].data == "ok"
    assert [asked[0] for asked in server.asked] == ["POST", "GET"]


@pytest.mark.parametrize("status", [301, 302])
def test_a_redirect_that_would_turn_a_post_into_a_get_does_not_count_as_a_success(status: int, server: Server) -> None:
    server.on("/charges/", reply(200, []))
    url = server.on("/charges", reply(status, None, location="/charges/"))
    assert "which POST does not follow" in failed(run(charge(url, retry=RETRY), Order()))
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_another_server_is_not_followed(status: int, server: Server) -> None:
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    url = server.on("/", reply(status, None, location=elsewhere + "/other?token=1"))
    error = failed(run(charge(url, method="GET", retry=RETRY), Order()))
    assert f"a redirect to {elsewhere}/other, which is another server" in error
    assert len(server.asked) == 1


def test_redirects_in_a_circle_end(server: Server) -> None:
    url = server.on("/", reply(307, None, location="/"))
    assert "redirected more than 5 times" in failed(run(charge(url, method="GET"), Order()))


# definitions


def test_without_httpx_the_definition_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(WorkflowDefinitionError, match=r"pip install 'stageflow-actors\[http\]'"):
        charge("http://x/")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"url": "example.org/x"}, "must begin with http://"),
        ({"url": "{id}/x"}, "must begin with http://"),
        ({"url": "http://x/{order"}, "cannot be read"),
        ({"url": "http://x/{}"}, "names of fields in braces"),
        ({"url": "http://x/{id!r}"}, "names of fields in braces"),
        ({"url": "http://x/{city[zip]}"}, "names of fields in braces"),
        ({"url": "http://x/{order_id}"}, r"names \{order_id\}, and Order has no such field: it has id, amount"),
        ({"url": 7}, "url of HTTP stage 'charge' must be a string or a function"),
        ({"url": "http://x/", "method": "FETCH"}, "method of HTTP stage 'charge' must be one of"),
        ({"url": "http://x/", "request": {"a": 1}}, "request of HTTP stage 'charge' must be a function"),
        ({"url": "http://x/", "on_response": 1}, "on_response of HTTP stage 'charge' must be a function"),
        ({"url": "http://x/", "method": "GET", "request": dict}, "sends no body with GET"),
        ({"url": "http://x/", "headers": {"a": 1}}, "headers of HTTP stage 'charge' must be a dict of strings"),
        ({"url": "http://x/", "timeout": -1}, "timeout of HTTP stage 'charge'"),
        ({"url": "http://x/", "retires": 1}, "unknown option 'retires'"),
    ],
)
def test_a_mistake_in_the_definition_is_raised_by_the_call_that_makes_it(options: dict[str, Any], why: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=why):
        charge(**options)


# in worker processes


def test_a_worker_asks_again_until_the_server_is_well(server: Server, tmp_path: Path) -> None:
    url = server.on("/charges", reply(500), hang_up, reply(200, {"id": "ch_1"}))
    workflow = charge(url, request=lambda order: {"amount": order.amount}, retry=Retry.fixed(5, 0.01))
    with Runtime(workflow, data_dir=tmp_path / "data") as runtime:
        result = runtime.execute(workflow, Order(), timeout=20)
    assert result.status == WorkflowStatus.completed
    assert result.stages[0].attempts == 3
    assert len({asked[2]["idempotency-key"] for asked in server.asked}) == 1


def test_http_stages_of_a_parallel_one_are_undone_over_http_with_a_key_of_their_own(
    server: Server, tmp_path: Path
) -> None:
    server.on("/hotel", reply(200, {"id": 7}))
    server.on("/hotel/7", reply(204))
    server.on("/car", reply(409, {"error": "no car"}))
    base = server.url
    undo = Compensation.http(lambda trip: f"{base}/hotel/{trip['hotel']['id']}", method="DELETE")
    workflow = Workflow("trips").add_parallel(
        "bookings",
        [
            Stage.http(
                "hotel",
                url=f"{base}/hotel",
                on_response=lambda trip, answer: trip.update(hotel=answer),
                compensation=undo,
            ),
            Stage.http("car", url=f"{base}/car"),
        ],
    )
    with Runtime(workflow, data_dir=tmp_path / "data") as runtime:
        result = runtime.execute(workflow, {}, timeout=20)
    assert result.status == WorkflowStatus.compensated
    assert result.error is not None
    assert '409 Conflict: {"error": "no car"}' in result.error
    keys = {asked[1]: asked[2]["idempotency-key"] for asked in server.asked}
    assert sorted(keys) == ["/car", "/hotel", "/hotel/7"]
    assert keys["/hotel/7"] == keys["/hotel"] + ":undo"


def test_a_worker_that_waits_longer_than_it_may_is_not_killed_for_it(server: Server, tmp_path: Path) -> None:
    url = server.on("/", keep_silent, reply(200, "ok"))
    workflow = charge(url, timeout=0.2, retry=Retry.fixed(2, 0))
    with Runtime(workflow, data_dir=tmp_path / "data") as runtime:
        result = runtime.execute(workflow, Order(), timeout=20)
    assert result.status == WorkflowStatus.completed
    assert workflow.stages[0].timeout == http.kill_after(0.2)


def test_the_exchange_ends_before_the_attempt_is_killed(server: Server, tmp_path: Path) -> None:
    url = server.on("/", keep_silent, reply(200, "ok"))
    workflow = Workflow("orders", context=Order, stage_timeout=3).add_http_stage("charge", url=url)
    with Runtime(workflow, data_dir=tmp_path / "data") as runtime:
        result = runtime.execute(workflow, Order(), timeout=20)
    assert failed(result).startswith(f"StageTimeout: POST {url} did not answer within 2.")
