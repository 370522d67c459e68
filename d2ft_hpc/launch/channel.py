"""Short messages over a connection: one JSON list a line, never blocking the reader."""

from __future__ import annotations

import json
import socket
from typing import Any

LONGEST_MESSAGE_BYTES = 1 << 20


class ClosedError(Exception):
    """The other end is gone."""


def as_line(*message: Any) -> bytes:
    """The message as it travels."""
    return json.dumps(message).encode() + b"\n"


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._socket = connection
        self._unread = b""
        self._unsent = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def is_sending(self) -> bool:
        """Whether the network has not taken everything yet, so that `flush` has to be called again."""
        return bool(self._unsent)

    def send(self, *message: Any) -> None:
        """Queues a message and sends what the network takes. A broken connection is left to `receive`."""
        self.send_line(as_line(*message))

    def send_line(self, line: bytes) -> None:
        """As `send`, of what `as_line` made: once for all that get it."""
        self._unsent += line
        self.flush()

    def flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""

    def receive(self) -> list[list[Any]]:
        """The complete messages that have come. Raises ClosedError at the end of the connection or on nonsense."""
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ClosedError(str(error)) from error
        *lines, self._unread = (self._unread + data).split(b"\n")
        if not data and not lines:
            raise ClosedError("closed by the other end")
        if len(self._unread) > LONGEST_MESSAGE_BYTES:
            raise ClosedError("not one of our messages")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise ClosedError("not one of our messages") from error
        if not all(isinstance(message, list) and message for message in messages):
            raise ClosedError("not one of our messages")
        return messages

    def close(self) -> None:
        self._socket.close()
