"""The store of torch.distributed that the ranks share: rank 0 serves it to those that came in by its listener.

torch's own TCPStore listens on all addresses and trusts everybody. Here each rank has one connection, opened at the
start; when the last rank has come, nobody listens any more. Values travel as base64 in JSON (`channel`).
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from torch.distributed import DistNetworkError, DistStoreError, Store  # type: ignore[attr-defined,unused-ignore]

from d2ft_hpc.launch.authenticated_socket import AuthenticatedListener
from d2ft_hpc.launch.channel import LONGEST_MESSAGE_BYTES, Channel, ClosedError
from d2ft_hpc.launch.control import GRACE_SECONDS

_FLUSH_SECONDS = 0.01
_OVERDUE_SECONDS = 0.1


class _Waiting(NamedTuple):
    """missing: those of the keys that were not there yet, the next one to look for last."""

    keys: list[str]
    missing: list[str]
    deadline: float


class StoreServer:
    """Serves the store in a thread as long as this process lives, and closes the listener behind the last rank."""

    def __init__(self, listener: AuthenticatedListener, world_size: int) -> None:
        self._door, self._missing = listener, set(range(world_size))
        self._values: dict[str, bytes] = {}
        self._waiting: dict[Channel, _Waiting] = {}  # a rank waits for one thing at a time
        self._awaited: dict[str, list[Channel]] = {}  # those that look for a key next
        self._sending: set[Channel] = set()  # whose network has not taken all yet
        self._look_again = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._admit)
        threading.Thread(target=self._run, name="store", daemon=True).start()

    def _run(self) -> None:
        while True:
            patience = _OVERDUE_SECONDS if self._waiting else None
            for key, _ in self._selector.select(_FLUSH_SECONDS if self._sending else patience):
                key.data()
            for channel in list(self._sending):
                channel.flush()
                if not channel.is_sending:
                    self._sending.remove(channel)
            now = time.monotonic()
            if self._waiting and now > self._look_again:
                self._look_again = now + _OVERDUE_SECONDS
                for channel in [each for each, waiting in self._waiting.items() if waiting.deadline < now]:
                    del self._waiting[channel]
                    self._answer(channel, None)

    def _answer(self, channel: Channel, answer: Any) -> None:
        channel.send(answer)
        if channel.is_sending:
            self._sending.add(channel)

    def _admit(self) -> None:
        for rank, connection in self._door.admit():
            channel = Channel(connection)
            self._selector.register(channel, selectors.EVENT_READ, partial(self._serve, channel))
            self._missing.discard(rank)
        if not self._missing:
            self._selector.unregister(self._door)
            self._door.close()

    def _serve(self, channel: Channel) -> None:
        try:
            for operation, *arguments in channel.receive():
                getattr(self, f"_do_{operation}")(channel, *arguments)
        except (ClosedError, AttributeError, TypeError, ValueError):  # gone, or of another version
            self._selector.unregister(channel)
            self._sending.discard(channel)
            self._waiting.pop(channel, None)
            channel.close()

    def _do_set(self, channel: Channel, key: str, value: str) -> None:
        self._put(key, b64decode(value))
        self._answer(channel, True)

    def _do_append(self, channel: Channel, key: str, value: str) -> None:
        self._put(key, self._values.get(key, b"") + b64decode(value))
        self._answer(channel, True)

    def _do_add(self, channel: Channel, key: str, amount: int) -> None:
        total = int(self._values.get(key, b"0")) + amount
        self._put(key, str(total).encode())
        self._answer(channel, total)

    def _do_compare_set(self, channel: Channel, key: str, expected: str, desired: str) -> None:
        held = self._values.get(key)
        if b64decode(expected) == (held or b""):
            self._put(key, b64decode(desired))
        self._answer(channel, _as_text(self._values.get(key, b64decode(expected))))

    def _do_delete_key(self, channel: Channel, key: str) -> None:
        self._answer(channel, self._values.pop(key, None) is not None)

    def _do_check(self, channel: Channel, keys: list[str]) -> None:
        self._answer(channel, all(key in self._values for key in keys))

    def _do_num_keys(self, channel: Channel) -> None:
        self._answer(channel, len(self._values))

    def _do_wait(self, channel: Channel, keys: list[str], seconds: float) -> None:
        self._waiting[channel] = _Waiting(keys, keys[::-1], time.monotonic() + seconds)
        self._look(channel)

    def _put(self, key: str, value: bytes) -> None:
        self._values[key] = value
        for channel in self._awaited.pop(key, ()):
            self._look(channel)

    def _look(self, channel: Channel) -> None:
        """Answers one that waits if all is there; else it is looked at again when the next key comes."""
        if channel not in self._waiting:  # it has been told that its time is over
            return
        keys, missing, _ = self._waiting[channel]
        while missing and missing[-1] in self._values:
            missing.pop()
        if not missing:  # but a key that was there may have been deleted meanwhile
            missing += [key for key in reversed(keys) if key not in self._values]
        if missing:
            self._awaited.setdefault(missing[-1], []).append(channel)
        else:
            del self._waiting[channel]
            self._answer(channel, [_as_text(self._values[key]) for key in keys])


class JobStore(Store):  # type: ignore[misc,unused-ignore]
    """One rank's end. torch calls it from several threads; a call that waits lets no other one pass, as in TCPStore.

    connection: from `connect_authenticated`. Keep a reference as long as torch.distributed runs, which holds
    none of its own.
    Raises DistStoreError if a key does not come in time, DistNetworkError if rank 0 is gone.
    """

    def __init__(self, connection: socket.socket, timeout_seconds: float) -> None:
        super().__init__()
        self._timeout_seconds = timeout_seconds
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._one_at_a_time = threading.Lock()

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key, _as_text(value))

    def get(self, key: str) -> bytes:
        return b64decode(self._wait([key], None)[0])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._wait(keys, timeout)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", keys))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        return b64decode(self._ask("compare_set", key, _as_text(expected), _as_text(desired)))

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete_key", key))

    def num_keys(self) -> int:
        return int(self._ask("num_keys"))

    def has_extended_api(self) -> bool:
        """gloo then asks once for the addresses of all ranks: `multi_get`."""
        return True

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [b64decode(value) for value in self._wait(keys, None)]

    def multi_set(self, keys: list[str], values: list[bytes | str]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def append(self, key: str, value: bytes | str) -> None:
        self._ask("append", key, _as_text(value))

    def clone(self) -> Store:
        return self

    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815 - by these names torch's C++ code calls them

    def _wait(self, keys: Sequence[str], timeout: timedelta | None) -> list[str]:
        seconds = self._timeout_seconds if timeout is None else timeout.total_seconds()
        values: list[str] | None = self._ask("wait", list(keys), seconds, patience_seconds=seconds)
        if values is None:
            raise DistStoreError(f"wait timeout after {seconds:g} s, keys: {', '.join(keys)}")
        return values

    def _ask(self, *request: Any, patience_seconds: float = 0.0) -> Any:
        line = json.dumps(request).encode() + b"\n"
        if len(line) > LONGEST_MESSAGE_BYTES:
            raise DistStoreError(f"{request[1]} is longer than the store's messages may be")
        try:
            with self._one_at_a_time:
                # Rank 0 says when a wait is over; this ends the one whose node is down.
                self._connection.settimeout(patience_seconds + self._timeout_seconds + GRACE_SECONDS)
                self._connection.sendall(line)
                answer = self._lines.readline()
        except OSError as error:
            raise DistNetworkError(f"lost the store of rank 0 ({error})") from error
        if not answer.endswith(b"\n"):
            raise DistNetworkError("lost the store of rank 0: it has closed the connection")
        return json.loads(answer)[0]


def _as_text(value: bytes | str) -> str:
    return b64encode(value.encode() if isinstance(value, str) else value).decode()
