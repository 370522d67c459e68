"""TCP connections of all ranks to rank 0, beside those of MPI and torch.distributed."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch.agree import agreed, share
from d2ft_hpc.launch.channel import Channel
from d2ft_hpc.launch.control import GRACE_SECONDS, Control, describe_ranks
from d2ft_hpc.launch.rendezvous import address_for


def connect_links(control: Control) -> dict[int, Channel]:
    """The peers of this rank: all others on rank 0, rank 0 elsewhere; on all ranks together.

    Rank 0 listens at a port that the kernel chooses, and takes nobody without the token that only the ranks know.
    Raises LaunchError on all ranks if one of them does not reach rank 0.
    """
    if control.world_size == 1:
        return {}
    server: socket.socket | None = None

    def serve() -> bytes:
        nonlocal server
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
        address = os.environ.get("MASTER_ADDR") or address_for(control.hosts)
        return f"{address} {server.getsockname()[1]} {secrets.token_hex()}".encode()

    address, port, token = share(control, serve, "opening a port for the watch").decode().split()
    with agreed(control, "connecting to rank 0's watch"):
        if server is not None:
            with server:
                return _accept_all(server, token, control)
        connection = socket.create_connection((address, int(port)), timeout=GRACE_SECONDS * 5)
        connection.sendall(f"{token} {control.rank:08d}\n".encode())
        return {0: Channel(connection)}
    raise AssertionError("unreachable")


def _accept_all(server: socket.socket, token: str, control: Control) -> dict[int, Channel]:
    peers: dict[int, Channel] = {}
    deadline = time.monotonic() + GRACE_SECONDS * 6
    while len(peers) < control.world_size - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = set(range(1, control.world_size)) - set(peers)
            raise LaunchError(
                f"{describe_ranks(sorted(missing), control.hosts)} did not reach the watch of rank 0 on {control.host}"
            ) from None
        connection.settimeout(GRACE_SECONDS)
        greeting = b""
        with suppress(OSError):
            greeting = _read(connection, len(token) + 10)
        word, _, rank = greeting.decode(errors="replace").strip().partition(" ")
        if secrets.compare_digest(word.encode(), token.encode()) and rank.isdecimal():
            peers[int(rank)] = Channel(connection)
        else:  # a port scanner
            connection.close()
    return peers


def _read(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, fewer if the connection ends; not one more, since messages follow."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data
