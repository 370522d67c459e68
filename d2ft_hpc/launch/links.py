"""Connections of all ranks to rank 0, beside those of MPI and torch.distributed."""

from __future__ import annotations

import json
import secrets
import time
from contextlib import closing

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch.agree import agreed, share
from d2ft_hpc.launch.authenticated_socket import AuthenticatedListener, Endpoint, connect_authenticated
from d2ft_hpc.launch.channel import Channel
from d2ft_hpc.launch.control import GRACE_SECONDS, Control, describe_ranks
from d2ft_hpc.launch.places import are_on_one_host, endpoint_for


def connect_links(control: Control) -> dict[int, Channel]:
    """The peers of this rank: all others on rank 0, rank 0 elsewhere; on all ranks together.

    Rank 0 listens until all have come, and takes nobody without the key that only the ranks know.
    Raises LaunchError on all ranks if one of them does not reach rank 0.
    """
    if control.world_size == 1:
        return {}
    listener: AuthenticatedListener | None = None
    one_host = are_on_one_host(control)

    def serve() -> bytes:
        nonlocal listener
        key = secrets.token_bytes(32)
        listener = AuthenticatedListener(endpoint_for(control.hosts, one_host), key, control.world_size)
        return json.dumps([*listener.endpoint, key.hex()]).encode()

    address, port, key = json.loads(share(control, serve, "opening a port for the watch"))
    with agreed(control, "connecting to rank 0's watch"):
        if listener is not None:
            with closing(listener):
                peers = _admit_all(listener, control)
        else:
            endpoint, secret = Endpoint(address, port), bytes.fromhex(key)
            peers = {0: Channel(connect_authenticated(endpoint, secret, control.rank, GRACE_SECONDS * 5))}
    return peers


def _admit_all(listener: AuthenticatedListener, control: Control) -> dict[int, Channel]:
    peers: dict[int, Channel] = {}
    deadline = time.monotonic() + GRACE_SECONDS * 6
    while len(peers) < control.world_size - 1:
        if time.monotonic() > deadline:
            missing = set(range(1, control.world_size)) - set(peers)
            raise LaunchError(
                f"{describe_ranks(sorted(missing), control.hosts)} did not reach the watch of rank 0 on {control.host}"
            )
        peers |= {rank: Channel(connection) for rank, connection in listener.admit(patience_seconds=0.1)}
    return peers
