"""Where rank 0 listens so that all ranks reach it, and as few others as possible."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch.authenticated_socket import Endpoint
from d2ft_hpc.launch.control import Control, describe_ranks


def are_on_one_host(control: Control) -> bool:
    """Whether the ranks reach each other's Unix sockets, as within one kernel, network namespace and user; all ranks
    call it together."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        where = f"{boot} {os.stat('/proc/self/ns/net').st_ino} {os.geteuid()}".encode()
    except OSError:
        where = secrets.token_bytes(16)
    return len(set(control.all_gather(where))) == 1


def endpoint_for(hosts: Sequence[str], one_host: bool, port: int = 0) -> Endpoint:
    """Where rank 0, which calls this, can listen so that all ranks reach it, and as few others as possible."""
    if one_host:
        return Endpoint(secrets.token_hex(16), None)
    return Endpoint(os.environ.get("MASTER_ADDR") or _address_for(hosts), port)


def _address_for(hosts: Sequence[str]) -> str:
    """The address at which the other ranks reach this process, if it is rank 0, on `hosts[0]`."""
    others = [host for host in hosts if host != hosts[0]]
    address = address_towards(others[0] if others else hosts[0])
    if address is None:
        rank = hosts.index(others[0]) if others else 0
        raise LaunchError(
            f"rank 0 on {hosts[0]} has no address that {describe_ranks([rank], hosts)} could"
            " reach. Set MASTER_ADDR to the address of rank 0."
        )
    return address


def address_towards(peer: str) -> str | None:
    """The address that this host would use to reach the peer, or else the internet."""
    # "Connecting" a UDP socket sends nothing; it makes the kernel choose the address that routes to the peer. The
    # second is a documentation address: it means the default route.
    for destination in (peer, "192.0.2.1"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((destination, 9))
                return str(probe.getsockname()[0])
            except OSError:
                continue
    return None
