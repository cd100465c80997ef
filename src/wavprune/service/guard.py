"""Which requests are let in: by host, by origin, by token; and what every answer says.

A page of another site can send requests to this machine. It can neither read the answers nor set
headers, unless its host name leads here (DNS rebinding): so names are checked. Requests that change
something are refused where the browser says that they come from elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from .limits import JSON_BYTES
from .service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "wavprune"
API, SESSION = "/api/", "/api/v1/session"
# The requests whose body is a file, and counted as it comes.
UPLOAD = re.compile(r"/api/v1/models(/[^/]+/inputs)?")
SAFE = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Guard:
    """An application that only sees requests that may be answered.

    Args:
        application: what answers them.
        service: what is served.
        token: what requests to the API must bring; None lets all in.
        names: host names that are allowed beside ``localhost`` and numbers.
    """

    def __init__(
        self,
        application: Application,
        service: Service,
        token: str | None,
        names: tuple[str, ...],
    ) -> None:
        self.service = service
        self._application = application
        self._token = token
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            # No route is a WebSocket; the lifespan has no one to check.
            if scope["type"] == "lifespan":
                await self._application(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refused = self._refused(scope, headers)

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in HEADERS.items()
                        if name.encode() not in own
                    ),
                ]
            await send(message)

        if refused is None:
            await self._application(scope, receive, sent)
        else:
            await _answer(sent, *refused)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._knows(host):
            return 421, (
                f"the host {host[:200]!r} is not this service's; allowed: numbers, "
                f"{', '.join(sorted(self._names))}"
            )
        if scope["method"] not in SAFE:
            origin = headers.get("origin")
            if origin is not None and _host_of(origin) != host.lower():
                return 403, f"the request comes from {origin[:200]!r}; allowed: this service's page"
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return 403, "the request comes from another site; allowed: this service's page"
        path = scope["path"]
        if scope["method"] not in SAFE and not UPLOAD.fullmatch(path):
            length = headers.get("content-length")
            if length is None and "transfer-encoding" in headers:
                return 411, "the length of the request is needed"
            if length is not None and (not length.isdigit() or int(length) > JSON_BYTES):
                return 413, f"the request has {length} bytes; allowed: up to {JSON_BYTES:,}"
        if path.startswith(API) and path != SESSION and not self._is_known(headers):
            return 401, "a token is needed: Authorization: Bearer TOKEN"
        return None

    def _knows(self, host: str) -> bool:
        """True for a host that no other site's name can lead to."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            urlsplit(f"//{host}").port  # noqa: B018  # raises where it is no number
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_known(self, headers: dict[str, str]) -> bool:
        if self._token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(given.strip(), self._token):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and same(cookie.value, session_of(self._token))


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def same(given: str, expected: str) -> bool:
    """True where two texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


def session_of(token: str) -> str:
    """What a browser keeps in place of the token."""
    return hashlib.sha256(f"wavprune session {token}".encode()).hexdigest()


async def _answer(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
