"""Who may use the API: keys, and without keys only this machine; and how large requests may be.

A page of another site that a user visits can send requests to the user's own machine: without keys, those are
known by their Host and Origin, and refused.
"""

import hashlib
import hmac
import os
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensoraplan.documents import read_text
from opensoraplan.serve.errors import ApiError
from opensoraplan.serve.settings import LOOPBACK

# What probes of the system ask, without a key.
OPEN = ("/health", "/ready")
# How much of a too large request is read before it is refused: a client that is still sending sees no answer.
_DISCARDED = 8


class Keys:
    """The keys of the API; none for a server that only this machine can reach."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def of(cls, file: Path | None) -> "Keys":
        """The keys of a file, one a line, and that of OSP_API_KEY. Raises ValueError if a file has none."""
        keys = [key] if (key := os.environ.get("OSP_API_KEY", "").strip()) else []
        if file is not None:
            lines = [line.strip() for line in read_text(file).splitlines()]
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise ValueError(f"{file} has no keys: write one into each line")
            keys += found
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str) -> str | None:
        """Who sends a request with this header: the digest of a key; None for a wrong key. Compares with
        every key in constant time.
        """
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest[:32] if any(matches) and scheme.lower() == "bearer" else None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Guard:
    """Refuses requests without a key, or from pages of other sites, and too large ones. Puts the `owner` into
    the state of the request.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, most_bytes: float) -> None:
        self._app, self._keys, self._most_bytes = app, keys, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            owner = "" if scope["path"] in OPEN else self._owner(headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, _Limited(receive, headers, self._most_bytes), send)

    def _owner(self, headers: Headers) -> str:
        if self._keys:
            owner = self._keys.owner(headers.get("authorization", ""))
            if owner is None:
                message = "a key of this server is needed, as in 'Authorization: Bearer KEY'"
                raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
            return owner
        host = headers.get("host", "")
        if _name_of(host) not in LOOPBACK:
            raise ApiError(403, f"this server has no keys and is for this machine only, not for {host!r}")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"this server has no keys and takes no requests of pages of {origin!r}")
        return ""


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class _Limited:
    """Receives a request of limited size."""

    def __init__(self, receive: Receive, headers: Headers, most_bytes: float) -> None:
        self._receive, self._most, self._count = receive, most_bytes, 0
        declared = headers.get("content-length", "")
        self._is_too_large = declared.isdecimal() and int(declared) > most_bytes

    async def __call__(self) -> Message:
        message = await self._receive()
        self._count += len(message.get("body", b""))
        if self._is_too_large or self._count > self._most:
            while message.get("more_body") and self._count < _DISCARDED * self._most:
                message = await self._receive()
                self._count += len(message.get("body", b""))
            raise ApiError(413, f"a request may have {self._most / 1e6:g} MB")
        return message
