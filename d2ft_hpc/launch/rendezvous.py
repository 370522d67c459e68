"""How the ranks find each other: a torch.distributed store at rank 0, then the default process group."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch import distributed
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined,unused-ignore]

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch.agree import AgreedError
from d2ft_hpc.launch.control import describe_ranks
from d2ft_hpc.launch.environment import LaunchEnvironment

__all__ = ["Store", "address_for", "connect_store", "meet_at_master", "serve_store", "start_process_group"]

LOOPBACK = "127.0.0.1"


def serve_store(address: str, port: int, timeout_seconds: float) -> TCPStore:
    """Serve a store; port 0 lets the kernel choose one. It stays bound as long as the store lives."""
    timeout = timedelta(seconds=timeout_seconds)
    try:
        return TCPStore(address, port, None, True, timeout, wait_for_workers=False)
    except DistError as error:
        raise LaunchError(
            f"rank 0 on {socket.gethostname()} cannot serve torch.distributed's rendezvous at"
            f" {address}:{port}: the port is in use (another job on this host?) or the address is not this"
            " host's. Unset MASTER_PORT, or choose another one (torchrun and deepspeed: --master_port)."
        ) from error


def connect_store(address: str, port: int, timeout_seconds: float) -> TCPStore:
    """Connect to the store that rank 0 serves, or will serve before the deadline."""
    deadline = time.monotonic() + timeout_seconds
    while True:  # a plain socket first, because torch's own retries write stack traces to stderr
        patience = max(0.1, deadline - time.monotonic())
        try:
            socket.create_connection((address, port), timeout=patience).close()
            return TCPStore(address, port, None, False, timedelta(seconds=patience))
        except (OSError, DistError) as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{socket.gethostname()} did not reach rank 0 at {address}:{port} within"
                    f" {timeout_seconds:g} s ({str(error).splitlines()[0]}). Rank 0 is not running, or"
                    " MASTER_ADDR or MASTER_PORT is wrong, or a firewall is in between."
                ) from error
        time.sleep(0.1)


def meet_at_master(environment: LaunchEnvironment, timeout_seconds: float) -> Store:
    """Meet all ranks at MASTER_ADDR:MASTER_PORT, where torchrun's agent or else rank 0 serves the store."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = environment.rank == 0 and not agent_serves
    server = (serve_store if serves else connect_store)(address, port, timeout_seconds)
    store = PrefixStore("d2ft_hpc/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), server)
    try:
        _await_all(store, environment, timeout_seconds)
    except DistError as error:
        # A rank 0 that served the store and stopped tells why.
        told_by_rank_0 = environment.rank != 0 and not agent_serves
        raise LaunchError(f"lost the connection to the store at {address}:{port} while the ranks met") from (
            AgreedError(error) if told_by_rank_0 else error
        )
    return store


def _await_all(store: Store, environment: LaunchEnvironment, timeout_seconds: float) -> None:
    rank, world_size = environment.rank, environment.world_size
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if store.add(f"rank {rank}", 1) > 1:
        raise LaunchError(
            f"two processes say that they are rank {rank} at MASTER_ADDR:MASTER_PORT {master}. If two jobs"
            " share the host, give one of them another MASTER_PORT; otherwise look at RANK."
        )
    if not _all_arrive(store, "arrived", world_size, timeout_seconds):
        missing = [str(r) for r in range(world_size) if not store.check([f"rank {r}"])]
        raise LaunchError(
            f"{len(missing)} of the {world_size} ranks that WORLD_SIZE={world_size} promises did not come"
            f" to {master} within {timeout_seconds:g} s: rank {', '.join(missing)}. Start every rank,"
            " with the same MASTER_ADDR and MASTER_PORT, or correct WORLD_SIZE."
        ) from AgreedError()


def _all_arrive(store: Store, where: str, world_size: int, timeout_seconds: float) -> bool:
    """Count this rank in and wait for the others; False if they do not come in time."""
    deadline = time.monotonic() + timeout_seconds
    arrived = store.add(where, 1)
    while arrived < world_size:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
        arrived = store.add(where, 0)
    return True


def start_process_group(
    store: Store,
    environment: LaunchEnvironment,
    backend: str,
    *,
    timeout_seconds: float,
    collective_timeout_seconds: float,
) -> None:
    """Start torch.distributed's default process group over the store; every rank must call this."""

    def start(name: str, backend: str, seconds: float) -> None:
        distributed.init_process_group(
            backend,
            store=PrefixStore(name, store),
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timedelta(seconds=seconds),
        )

    # gloo has one timeout for connecting and for all that follows. A short-lived group finds out within
    # `timeout_seconds` whether the ranks reach each other; it must live until all of them have connected.
    try:
        start("trial", "gloo", timeout_seconds)
        if not _all_arrive(store, "trial connected", environment.world_size, timeout_seconds):
            raise RuntimeError("another rank failed to connect")
        distributed.destroy_process_group()
        start("default", backend, collective_timeout_seconds)
    except RuntimeError as error:
        raise LaunchError(
            f"the ranks met, but gloo cannot connect them within {timeout_seconds:g} s"
            f" ({str(error).splitlines()[0]}). If the hosts have several networks, name the right one with"
            " GLOO_SOCKET_IFNAME."
        ) from error


def address_for(hosts: Sequence[str]) -> str:
    """The address at which the other ranks reach this process, which is rank 0, on `hosts[0]`."""
    others = [host for host in hosts if host != hosts[0]]
    if not others:
        return LOOPBACK
    # "Connecting" a UDP socket sends nothing; it makes the kernel choose the address that routes to the peer.
    for peer in (others[0], "192.0.2.1"):  # the second is a documentation address: it means the default route
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((peer, 9))
                return str(probe.getsockname()[0])
            except OSError:
                continue
    raise LaunchError(
        f"rank 0 on {hosts[0]} has no address that {describe_ranks([hosts.index(others[0])], hosts)} could"
        " reach. Set MASTER_ADDR to the address of rank 0."
    )
