"""`HttpCall`: the handler of a stage that sends an HTTP request.

It sends JSON, reads JSON, and makes one exchange per attempt. Its constructor validates it; httpx (the extra `http`) is
imported only in the worker that sends the first request. Answers must not be trusted: their size is limited, and a
redirect to another origin is not followed, because the headers of the request would be sent there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import string
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict
from urllib.parse import quote

import msgspec
import orjson

from stageflow_actors.definition.callables import check_function, with_ctx
from stageflow_actors.definition.duration import Duration, optional_seconds
from stageflow_actors.errors import StageError, StageTimeout, WorkflowDefinitionError

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "HttpCall", "HttpOptions", "kill_after", "redact_url"]

DEFAULT_TIMEOUT_SECONDS = 30.0
"""Time limit of an attempt if neither the stage nor its workflow sets one."""

MAX_RESPONSE_BYTES = 10 << 20
"""Limit of bytes of the body of a response."""

MAX_REDIRECTS = 5
"""Limit of redirects of one exchange."""

MAX_EXCERPT_CHARS = 200
"""Limit of characters of a response's body in an error."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_client_lock = threading.Lock()


class HttpOptions(TypedDict, total=False):
    """The options that HTTP stages and HTTP compensations share.

    `HttpCall` describes them.
    """

    method: str
    request: Callable[[Any], Any] | None
    on_response: Callable[[Any, Any], Any] | None
    headers: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None


class HttpCall:
    """A request to a server, and the handling of its answer.

    An answer 5xx or 429 and a network failure raise `StageError(retryable=True)`; no answer in time raises
    `StageTimeout`; every other answer than a success raises `StageError(retryable=False)`.

    Args:
        url: The URL, in which `{field}` stands for a field of the context (percent-encoded; `{address.city}` for a
            nested one); or a function of the context.
        what: Name of the stage in errors.
        method: The HTTP method.
        request: Function of the context that returns the JSON to send.
        on_response: Called as `on_response(context, response)` with the JSON of the answer; returns what a handler may
            return. Without it the JSON is the result of the stage (None for an empty body).
        headers: A dict, or a function of the context.
        timeout: Seconds to wait for the answer.
        undo: True for a compensation: its `Idempotency-Key` differs from that of the stage.
    """

    __slots__ = (
        "__weakref__",
        "_calls",
        "_client",
        "headers",
        "method",
        "on_response",
        "request",
        "timeout",
        "undo",
        "url",
    )

    def __init__(
        self,
        url: str | Callable[[Any], str],
        *,
        what: str,
        method: str = "POST",
        request: Callable[[Any], Any] | None = None,
        on_response: Callable[[Any, Any], Any] | None = None,
        headers: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None = None,
        timeout: Duration | None = None,
        undo: bool = False,
    ) -> None:
        if importlib.util.find_spec("httpx") is None:
            raise WorkflowDefinitionError(
                f"{what} needs httpx, which is not installed: pip install 'stageflow-actors[http]'"
            )
        if not isinstance(method, str) or method.upper() not in _METHODS:
            raise WorkflowDefinitionError(f"method of {what} must be one of {', '.join(sorted(_METHODS))}: {method!r}")
        self.method = method.upper()
        self.url: Callable[[Any], Any] = _url(url, what)
        self.request = None if request is None else check_function(request, f"request of {what}")
        if self.request is not None and self.method in _BODILESS:
            raise WorkflowDefinitionError(
                f"{what} sends no body with {self.method}: put the parameters into the url, as in "
                "'https://example.org/prices/{sku}', or use another method"
            )
        self.on_response: Callable[[Any, Any], Any] | None = None
        if on_response is not None:
            self.on_response = check_function(on_response, f"on_response of {what}", ("context", "response"))
        self.headers = _headers(headers, what)
        self.timeout = optional_seconds(timeout, f"the timeout of {what}")
        self.undo = undo
        self._client: Any = None
        self._calls: dict[str, Callable[..., Any]] = {}

    def execute(self, context: Any, ctx: Any) -> Any:
        """Send the request and return the result of the stage."""
        answer = self._exchange(context, ctx)
        return answer if self.on_response is None else self._call("on_response", context, answer, ctx)

    def _call(self, name: str, *values: Any) -> Any:
        """Call one of the user's functions with its values and the ctx, the last of `values`."""
        call = self._calls.get(name)
        if call is None:
            call = self._calls[name] = with_ctx(getattr(self, name), len(values) - 1)
        return call(*values)

    def fields(self) -> list[str]:
        """Return the fields of the context that the url names."""
        return self.url.fields if isinstance(self.url, _Template) else []

    # one exchange

    def _exchange(self, context: Any, ctx: Any) -> Any:
        import httpx

        client = self._open()
        seconds = self._seconds(ctx)
        ends = time.monotonic() + seconds
        url = _check_url(self._call("url", context, ctx))
        at = f"{self.method} {redact_url(url)}"
        try:
            first = request = client.build_request(
                self.method,
                url,
                content=None if self.request is None else _json(self._call("request", context, ctx)),
                headers=self._headers(context, ctx),
                timeout=seconds,
            )
            for _ in range(MAX_REDIRECTS + 1):
                response = client.send(request, stream=True, follow_redirects=False)
                try:
                    following = self._next_request(first, response)
                    if following is None:
                        body = _body(response, ends)
                        return _decode_answer(request, response, body)
                finally:
                    response.close()
                request = following
            raise StageError(f"{at} redirected more than {MAX_REDIRECTS} times")
        except httpx.TimeoutException:
            raise StageTimeout(f"{at} did not answer within {seconds:g} s") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            why = "percent-encode its user and password" if "@" in url else str(error)  # which may quote them
            raise StageError(f"the url cannot be used: {why}") from None
        except httpx.DecodingError as error:
            raise StageError(f"{at} sent a body that cannot be decoded: {error}") from None
        except httpx.TransportError as error:
            text = str(error) or type(error).__name__
            raise StageError(f"{at} failed: {text}", retryable=True) from error

    def _seconds(self, ctx: Any) -> float:
        """Return the time limit of the exchange.

        It is shorter than that of the attempt, whose timeout kills the process.
        """
        if self.timeout is not None:
            return self.timeout
        if ctx.deadline is None:
            return DEFAULT_TIMEOUT_SECONDS
        return max(0.001, 0.9 * float(ctx.deadline - time.monotonic()))

    def _headers(self, context: Any, ctx: Any) -> dict[str, str]:
        key = ctx.idempotency_key
        if self.undo:
            key += ":undo"  # with the key of the stage, the server would repeat its answer to the stage
        made = {
            "Accept": "application/json",
            "User-Agent": "stageflow-actors",
            "Idempotency-Key": quote(key, safe=_VISIBLE),
        }
        if self.request is not None:
            made["Content-Type"] = "application/json"
        given = self._call("headers", context, ctx) if callable(self.headers) else self.headers
        own = {name.lower() for name in given}
        return {name: value for name, value in made.items() if name.lower() not in own} | dict(given)

    def _next_request(self, first: Any, response: Any) -> Any:
        """Return the request of a redirect, None for other answers.

        Raise `StageError` if the redirect must not be followed.
        """
        following = response.next_request
        if following is None:
            return None
        target = redact_url(str(following.url))
        at = f"{_describe_request(first)} answered {response.status_code}, a redirect to {target}"
        if _origin(following.url) != _origin(first.url):
            raise StageError(f"{at}, which is another server: use the final url")
        if following.method != response.request.method and response.status_code != 303:
            # A POST that becomes a GET would be reported as done without having been performed.
            raise StageError(f"{at}, which {response.request.method} does not follow: use the final url")
        return following

    def _open(self) -> Any:
        """Return the client of this process, created on first use.

        It keeps connections open.
        """
        with _client_lock:
            if self._client is None:
                import httpx

                self._client = httpx.Client()
                # A cookie for one instance must not be sent with the request of the next.
                self._client.cookies = _NoCookies()
                weakref.finalize(self, self._client.close)
            return self._client

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in self.__slots__ if name not in ("__weakref__", "_calls", "_client")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._client, self._calls = None, {}
        # A worker has just started: the slow import must not count against the time of an attempt.
        self._open()

    def __repr__(self) -> str:
        return f"HttpCall({self.method} {self.url!r})"


def kill_after(timeout: float | None) -> float | None:
    """Return the timeout of an attempt whose exchange may take `timeout` seconds.

    The timeout of the attempt kills the process, so it is much longer.
    """
    return None if timeout is None else 2 * timeout + 1


def _NoCookies() -> Any:  # noqa: N802 - used like a class
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


# urls


class _Template:
    """A url with fields of a context, as `https://host/orders/{id}`.

    Each field is percent-encoded.
    """

    __slots__ = ("_parts", "_text")

    def __init__(self, text: str, what: str) -> None:
        if not text.startswith(("http://", "https://")):
            raise WorkflowDefinitionError(
                f"the url of {what} must begin with http:// or https://, not {text!r}: "
                "give a function of the context if the server itself depends on it"
            )
        self._text = text
        self._parts = list(_parse_template(text, what))

    @property
    def fields(self) -> list[str]:
        """The fields of the context that the url names."""
        return [path[0] for _, path in self._parts if path]

    def __call__(self, context: Any) -> str:
        made = ""
        for literal, path in self._parts:
            made += literal
            if path:
                value = _look_up(context, path)
                if value in (".", "..") or (not value and "?" not in made):
                    raise StageError(f"the url has {'.'.join(path)}={value!r}, which would change the path of the url")
                made += quote(value, safe="")
        return made

    def __repr__(self) -> str:
        return repr(redact_url(self._text))


def _parse_template(text: str, what: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (literal, path of the field after it); the last path may be empty."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise WorkflowDefinitionError(f"the url of {what} cannot be read: {error} in {text!r}") from None
    for literal, field, form, conversion in parts:
        if field is None:
            yield literal, []
            continue
        path = field.split(".")
        if form or conversion or not all(name.isidentifier() for name in path):
            raise WorkflowDefinitionError(
                f"the url of {what} takes names of fields in braces, as {{order_id}}, not {{{field}}}: "
                "give a function of the context for more than that"
            )
        yield literal, path


def _look_up(context: Any, path: list[str]) -> str:
    value = context
    for name in path:
        try:
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        except (KeyError, AttributeError):
            raise StageError(f"the url needs {'.'.join(path)}, which the context does not have") from None
    if value is None or isinstance(value, (Mapping, list, tuple, set, bytes)):
        raise StageError(f"the url needs {'.'.join(path)}, which is {value!r:.50}")
    return str(value)


def _check_url(url: Any) -> str:
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        shown = redact_url(url) if isinstance(url, str) else url
        raise StageError(f"the url must be a string that begins with http:// or https://, not {shown!r:.80}")
    return url


def _origin(url: Any) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def _describe_request(request: Any) -> str:
    return f"{request.method} {redact_url(str(request.url))}"


def redact_url(url: str) -> str:
    """Return a url without user, password, query and fragment.

    These may be secret, and logs are not.
    """
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    place = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


# bodies


def _json(value: Any) -> bytes:
    try:
        data = orjson.dumps(value, default=_plain)
    except TypeError as error:
        raise StageError(f"the request is not JSON: {error}") from None
    if b"null" in data and _holds_non_finite(value):
        raise StageError("the request is not JSON: it holds NaN or infinity, which would be sent as null")
    return data


def _plain(value: Any) -> Any:
    """Return a Struct or a pydantic model as plain data for orjson."""
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _holds_non_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(map(_holds_non_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_non_finite, value))
    if isinstance(value, msgspec.Struct):
        return any(_holds_non_finite(getattr(value, name)) for name in value.__struct_fields__)
    if dataclasses.is_dataclass(value):
        return any(_holds_non_finite(getattr(value, each.name)) for each in dataclasses.fields(value))
    if hasattr(value, "model_dump"):
        return any(map(_holds_non_finite, vars(value).values()))
    return False


def _body(response: Any, ends: float) -> bytes:
    """Return the body; raise if it exceeds the limits of size or time."""
    at = _describe_request(response.request)
    announced = response.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_RESPONSE_BYTES and response.request.method != "HEAD":
        raise StageError(f"{at} answered with {int(announced):,} bytes, over the limit of {MAX_RESPONSE_BYTES:,}")
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise StageError(f"{at} answered with more than the limit of {MAX_RESPONSE_BYTES:,} bytes")
        if time.monotonic() > ends:
            raise StageTimeout(f"{at} did not finish its answer in time")
    return bytes(body)


def _decode_answer(request: Any, response: Any, body: bytes) -> Any:
    """Return the JSON of a success; raise `StageError` for other answers."""
    status = response.status_code
    if not 200 <= status < 300:
        text = f"{_describe_request(request)} answered {status} {response.reason_phrase}".rstrip()
        raise StageError(text + _excerpt(body), retryable=status >= 500 or status == 429)
    if not body.strip():
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        kind = response.headers.get("content-type", "no content type")
        raise StageError(
            f"{_describe_request(request)} answered {status} with no JSON ({kind}){_excerpt(body)}"
        ) from None


def _excerpt(body: bytes) -> str:
    text = " ".join(body[: 4 * MAX_EXCERPT_CHARS].decode("utf-8", "replace").split())
    return f": {text[:MAX_EXCERPT_CHARS]}{'…' if len(text) > MAX_EXCERPT_CHARS else ''}" if text else ""


# definitions


def _url(given: Any, what: str) -> Callable[[Any], Any]:
    if isinstance(given, str):
        return _Template(given, what)
    return check_function(given, f"url of {what}", also=" a string or")


def _headers(given: Any, what: str) -> Callable[[Any], Mapping[str, str]] | dict[str, str]:
    if given is None:
        return {}
    if callable(given):
        return check_function(given, f"headers of {what}")
    if not isinstance(given, Mapping) or not all(isinstance(part, str) for pair in given.items() for part in pair):
        raise WorkflowDefinitionError(
            f"headers of {what} must be a dict of strings, or a function of the context that gives one, not {given!r}"
        )
    return dict(given)
