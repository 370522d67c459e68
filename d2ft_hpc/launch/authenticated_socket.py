"""Where rank 0 lets the other ranks in: a listening socket that only admits who proves to hold the job's key.

Ranks of one host meet at a Unix socket, which no network reaches and where the kernel tells whose process knocks; ranks
of several hosts at one address and port. Each side proves that it holds the key by answering the other's random
challenge (HMAC-SHA256), in messages of fixed length: what a stranger sends is never parsed, and little of it is kept.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import secrets
import selectors
import socket
import struct
import time
from typing import NamedTuple

CHALLENGE_BYTES = PROOF_BYTES = 32
_RANK = struct.Struct("!I")
_ANSWER_BYTES = CHALLENGE_BYTES + _RANK.size + PROOF_BYTES
_STRANGERS = 128  # connections that have proved nothing yet, beyond the ranks that are expected


class Endpoint(NamedTuple):
    """Where rank 0 listens."""

    address: str
    """An IP address or a host's name; if there is no port, the name of a Unix socket in Linux's abstract
    namespace."""
    port: int | None
    """0 lets the kernel choose one. None: for processes of this host and this user alone."""

    def __str__(self) -> str:
        return "a socket of this host" if self.port is None else f"{self.address}:{self.port}"


class AuthenticatedListener:
    """Listens at a endpoint, or raises OSError. Selectors can wait for it: it is readable when `admit` has work to do.

    key: shared by the ranks; empty where they have no way to share one. guests: how many are expected.
    """

    def __init__(self, endpoint: Endpoint, key: bytes, guests: int) -> None:
        self._server = _listen(endpoint)
        self._server.setblocking(False)
        self.endpoint = (
            endpoint if endpoint.port is None else Endpoint(endpoint.address, self._server.getsockname()[1])
        )
        self._key = key
        self._room = guests + _STRANGERS
        # Of each connection the challenge, and the answer as far as it has come.
        self._waiting: dict[socket.socket, tuple[bytes, bytes]] = {}
        self._selector = selectors.EpollSelector()
        self._selector.register(self._server, selectors.EVENT_READ)

    def fileno(self) -> int:
        return self._selector.fileno()

    def admit(self, patience_seconds: float = 0.0) -> list[tuple[int, socket.socket]]:
        """The connections that have proved to hold the key since the last call, each with the rank that it claims to
        be."""
        admitted = []
        for key, _ in self._selector.select(patience_seconds):
            knocking = key.fileobj
            assert isinstance(knocking, socket.socket)
            if knocking is self._server:
                self._challenge()
            elif knocking in self._waiting and (rank := self._examine(knocking)) is not None:
                admitted.append((rank, knocking))
        return admitted

    def close(self) -> None:
        for connection in list(self._waiting):
            self._forget(connection).close()
        self._server.close()
        self._selector.close()

    def _challenge(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # it went away again, or this process has no file descriptor left
            return
        if connection.family == socket.AF_UNIX and _user_of(connection) != os.geteuid():
            connection.close()
            return
        while len(self._waiting) >= self._room:
            self._forget(next(iter(self._waiting))).close()  # a rank would try again
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        connection.setblocking(False)
        self._waiting[connection] = challenge, b""
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            connection.send(challenge)
        except OSError:
            self._forget(connection).close()

    def _examine(self, connection: socket.socket) -> int | None:
        """The rank of a peer that has proved to hold the key; None while its answer is still coming, and for others,
        which are sent away."""
        challenge, answer = self._waiting[connection]
        try:
            more = connection.recv(_ANSWER_BYTES - len(answer))
        except BlockingIOError:
            return None
        except OSError:
            more = b""
        answer += more
        self._waiting[connection] = challenge, answer
        if more and len(answer) < _ANSWER_BYTES:
            return None
        self._forget(connection)
        said, proof = answer[:-PROOF_BYTES], answer[-PROOF_BYTES:]
        if more and hmac.compare_digest(proof, _proof(self._key, b"rank", challenge, said)):
            try:
                connection.send(_proof(self._key, b"rank 0", challenge, said))
                return int(_RANK.unpack(said[CHALLENGE_BYTES:])[0])
            except OSError:
                pass
        connection.close()
        return None

    def _forget(self, connection: socket.socket) -> socket.socket:
        del self._waiting[connection]
        self._selector.unregister(connection)
        return connection


def connect_authenticated(endpoint: Endpoint, key: bytes, rank: int, timeout_seconds: float) -> socket.socket:
    """A connection to rank 0, which listens at the endpoint or will before the deadline. Raises OSError if nobody
    listens there, or only somebody without the key.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return _knock(endpoint, key, rank, max(0.1, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _knock(endpoint: Endpoint, key: bytes, rank: int, timeout_seconds: float) -> socket.socket:
    if endpoint.port is None:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_seconds)
    else:
        connection = socket.create_connection((endpoint.address, endpoint.port), timeout=timeout_seconds)
    try:
        if endpoint.port is None:
            connection.connect(_abstract(endpoint.address))
            if _user_of(connection) != os.geteuid():
                raise ConnectionRefusedError("another user's process listens there")
        challenge = _read(connection, CHALLENGE_BYTES)
        said = secrets.token_bytes(CHALLENGE_BYTES) + _RANK.pack(rank)
        connection.sendall(said + _proof(key, b"rank", challenge, said))
        if not hmac.compare_digest(_read(connection, PROOF_BYTES), _proof(key, b"rank 0", challenge, said)):
            raise ConnectionRefusedError("who listens there does not hold this job's key")
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def _read(connection: socket.socket, size: int) -> bytes:
    """Not one byte more, since messages follow."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionRefusedError("who listens there is not this job's rank 0, or it has another key")
        data += more
    return data


def _proof(key: bytes, who: bytes, challenge: bytes, said: bytes) -> bytes:
    return hmac.digest(key, b"d2ft_hpc " + who + b":" + challenge + said, "sha256")


def _listen(endpoint: Endpoint) -> socket.socket:
    """As narrow as the endpoint allows."""
    if endpoint.port is None:
        server = socket.socket(socket.AF_UNIX)
        server.bind(_abstract(endpoint.address))
        server.listen(1024)
        return server
    family, *_, found = socket.getaddrinfo(endpoint.address, endpoint.port, type=socket.SOCK_STREAM)[0]
    # A host's own name may be a loopback address on this host and another one on all others.
    if endpoint.address == found[0] or not ipaddress.ip_address(str(found[0]).partition("%")[0]).is_loopback:
        try:
            return socket.create_server((str(found[0]), endpoint.port), family=family, backlog=1024)
        except OSError as error:
            # The others may reach this host by an address that is not its own.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", endpoint.port), family=family, dualstack_ipv6=dual, backlog=1024)


def _abstract(name: str) -> str:
    return f"\0d2ft_hpc/{os.geteuid()}/{name}"


def _user_of(connection: socket.socket) -> int:
    """The user of the process at the other end of a Unix socket, as the kernel knows it."""
    credentials = struct.Struct("3i")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return int(credentials.unpack(raw)[1])
