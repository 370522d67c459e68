"""How the ranks find each other: a store at rank 0 (`store`), then torch.distributed's default process group."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from datetime import timedelta

from torch import distributed
from torch.distributed import (  # type: ignore[attr-defined,unused-ignore]
    DistError,
    DistStoreError,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch.agree import AgreedError, agreed, share
from d2ft_hpc.launch.authenticated_socket import AuthenticatedListener, Endpoint, connect_authenticated
from d2ft_hpc.launch.control import Control
from d2ft_hpc.launch.environment import LaunchEnvironment
from d2ft_hpc.launch.places import address_towards, are_on_one_host, endpoint_for
from d2ft_hpc.launch.store import JobStore, StoreServer

LOOPBACK = "127.0.0.1"

SECRET = "D2FT_SECRET"
"""Variable with a secret of the job, the same on all ranks, for launchers that give the ranks no way to share one."""

_MESH_RANKS = 64
"""Up to so many ranks gloo connects each with each at the start, for which rank 0 sends every rank what every pair
needs: bytes by the cube of their number, 94 GB for 1,024 ranks. Of more, two connect when they first meet."""

_KEPT: list[Store] = []
"""torch.distributed keeps only the C++ half of a store that is written in Python."""


def meet_over(control: Control, port: int) -> tuple[Store, Endpoint, tuple[str, int]]:
    """Meet all ranks. The control plane connects them already and carries the job's key.

    port: where rank 0 listens for other hosts; 0 lets the kernel choose. Also returns an address and a port for
    MASTER_ADDR and MASTER_PORT, which libraries look for; nobody listens there once all have met.
    """
    if control.world_size == 1:
        return HashStore(), Endpoint("", None), (LOOPBACK, _free_port())
    one_host = are_on_one_host(control)

    def serve() -> bytes:
        key = secrets.token_bytes(32)
        endpoint = _serve(endpoint_for(control.hosts, one_host, port), key, control.world_size)
        master = (LOOPBACK, _free_port()) if endpoint.port is None else endpoint
        return json.dumps([endpoint, master, key.hex()]).encode()

    told, master, key = json.loads(share(control, serve, "opening the rendezvous of the ranks"))
    endpoint = Endpoint(*told)
    with agreed(control, "connecting to rank 0"):
        store = _join_store(endpoint, bytes.fromhex(key), control.rank, control.timeout_seconds)
    return store, endpoint, (master[0], master[1])


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def _serve(endpoint: Endpoint, key: bytes, world_size: int) -> Endpoint:
    """Serve the store to the ranks; the endpoint with its port."""
    try:
        listener = AuthenticatedListener(endpoint, key, world_size)
    except OSError as error:
        raise LaunchError(
            f"rank 0 on {socket.gethostname()} cannot serve the rendezvous at {_master() or endpoint}: {error.strerror}"
            " (another job on this host?). Unset MASTER_PORT, or choose another one (torchrun and deepspeed:"
            " --master_port)."
        ) from error
    StoreServer(listener, world_size)
    return listener.endpoint


def _join_store(endpoint: Endpoint, key: bytes, rank: int, timeout_seconds: float) -> Store:
    """Connect to the store that rank 0 serves, or will serve before the deadline."""
    try:
        store = JobStore(connect_authenticated(endpoint, key, rank, timeout_seconds), timeout_seconds)
    except OSError as error:
        raise LaunchError(
            f"{socket.gethostname()} did not reach rank 0 at {_master() or endpoint} within"
            f" {timeout_seconds:g} s ({error}). Rank 0 is not running, or MASTER_ADDR, MASTER_PORT or"
            f" {SECRET} is wrong, or a firewall is in between."
        ) from error
    _KEPT.append(store)
    return store


def _master() -> str:
    return ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")).strip(":")


def meet_at_master(environment: LaunchEnvironment, timeout_seconds: float) -> tuple[Store, Endpoint]:
    """Meet all ranks that share nothing but MASTER_ADDR, MASTER_PORT and, if it is set, `SECRET`.

    On one host they meet at a Unix socket that is named after them. On several, torchrun's agent serves a store there,
    which tells a key and where rank 0 listens; without it rank 0 itself listens there.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = environment.rank, environment.world_size
    key = os.environ.get(SECRET, "").encode()
    if _is_on_one_host(address, world_size):
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        job = [address, port, *(os.environ.get(name) for name in names)]
        endpoint = Endpoint(hashlib.sha256(json.dumps(job).encode()).hexdigest()[:32], None)
        if rank == 0:
            _serve(endpoint, key, world_size)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agent = PrefixStore(
            "d2ft_hpc/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            _connect_to_agent(address, port, timeout_seconds),
        )
        try:
            if rank == 0:
                towards = address_towards(address) or LOOPBACK
                own = Endpoint(address if towards.startswith("127.") else towards, 0)
                made = secrets.token_bytes(32)
                agent.set("rank 0", json.dumps([*_serve(own, key + made, world_size), made.hex()]))
            told_address, told_port, more = json.loads(agent.get("rank 0"))
            endpoint, key = Endpoint(str(told_address), int(told_port)), key + bytes.fromhex(more)
        except (DistError, ValueError, TypeError, RecursionError) as error:
            raise LaunchError(
                f"torchrun's store at {address}:{port} does not tell where rank 0 is ({str(error).splitlines()[0]})"
            ) from error
    else:
        endpoint = Endpoint(address, port)
        if rank == 0:
            endpoint = _serve(endpoint, key, world_size)
    store = _join_store(endpoint, key, rank, timeout_seconds)
    try:
        _await_all(store, environment, timeout_seconds)
    except DistError as error:
        # Rank 0, which served the store and stopped, tells why.
        raise LaunchError(
            f"lost the connection to the store of rank 0 at {_master()} while the ranks met"
        ) from (AgreedError(error) if rank != 0 else error)
    return store, endpoint


def _is_on_one_host(master_address: str, world_size: int) -> bool:
    if str(world_size) in (os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("LOCAL_SIZE")):
        return True  # torchrun and deepspeed say so
    return master_address in ("localhost", "::1") or master_address.startswith("127.")


def _connect_to_agent(address: str, port: int, timeout_seconds: float) -> TCPStore:
    deadline = time.monotonic() + timeout_seconds
    while True:  # a plain socket first, because torch's own retries write stack traces to stderr
        patience = max(0.1, deadline - time.monotonic())
        try:
            socket.create_connection((address, port), timeout=patience).close()
            return TCPStore(address, port, None, False, timedelta(seconds=patience))
        except (OSError, DistError) as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{socket.gethostname()} did not reach torchrun's store at {address}:{port} within"
                    f" {timeout_seconds:g} s ({str(error).splitlines()[0]})"
                ) from error
        time.sleep(0.1)


def _await_all(store: Store, environment: LaunchEnvironment, timeout_seconds: float) -> None:
    rank, world_size = environment.rank, environment.world_size
    if store.add(f"rank {rank}", 1) > 1:
        raise LaunchError(
            f"two processes say that they are rank {rank} at MASTER_ADDR:MASTER_PORT {_master()}. If two jobs"
            " share the host, give one of them another MASTER_PORT; otherwise look at RANK."
        )
    if not _all_arrive(store, "arrived", world_size, timeout_seconds):
        missing = [str(r) for r in range(world_size) if not store.check([f"rank {r}"])]
        raise LaunchError(
            f"{len(missing)} of the {world_size} ranks that WORLD_SIZE={world_size} promises did not come"
            f" to {_master()} within {timeout_seconds:g} s: rank {', '.join(missing)}. Start every rank,"
            " with the same MASTER_ADDR and MASTER_PORT, or correct WORLD_SIZE."
        ) from AgreedError()


def _all_arrive(store: Store, where: str, world_size: int, timeout_seconds: float) -> bool:
    """Count this rank in and wait for the others; False if they do not come in time."""
    if store.add(where, 1) == world_size:
        store.set(f"all {where}", "yes")
    try:
        store.wait([f"all {where}"], timedelta(seconds=timeout_seconds))
    except DistStoreError:
        return False
    return True


def start_process_group(
    store: Store,
    environment: LaunchEnvironment,
    backend: str,
    *,
    one_host: bool,
    timeout_seconds: float,
    collective_timeout_seconds: float,
) -> None:
    """Start torch.distributed's default process group over the store; every rank must call this.

    On one host gloo and NCCL listen on the loopback interface alone, unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME
    say otherwise.
    """
    if one_host:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    lazily = environment.world_size > _MESH_RANKS
    if lazily:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # NCCL's monitor would ask the store each second whether a rank wants a dump, to the very end of the process,
    # where a store that is written in Python may not be called any more: the process would abort.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")

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
        if lazily:
            distributed.barrier()
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
