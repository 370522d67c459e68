"""Who passes the listener of rank 0, and what a store behind it answers: as torch's own HashStore does."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError, DistStoreError, HashStore, PrefixStore, Store

from d2ft_hpc.launch.authenticated_socket import AuthenticatedListener, Endpoint, connect_authenticated
from d2ft_hpc.launch.channel import LONGEST_MESSAGE_BYTES
from d2ft_hpc.launch.store import JobStore, StoreServer

KEY = secrets.token_bytes(32)
THIS_HOST = Endpoint(f"test-{os.getpid()}", None)
LOOPBACK = Endpoint("127.0.0.1", 0)


@pytest.fixture(params=[THIS_HOST, LOOPBACK], ids=["one host", "network"])
def listener(request: pytest.FixtureRequest) -> Iterator[AuthenticatedListener]:
    listener = AuthenticatedListener(request.param, KEY, guests=2)
    yield listener
    listener.close()


def knock(endpoint: Endpoint) -> socket.socket:
    """A stranger's connection."""
    stranger = socket.socket(socket.AF_UNIX if endpoint.port is None else socket.AF_INET)
    stranger.connect(
        f"\0d2ft_hpc/{os.geteuid()}/{endpoint.address}"
        if endpoint.port is None
        else (endpoint.address, endpoint.port)
    )
    return stranger


def entering(
    endpoint: Endpoint, key: bytes, rank: int
) -> tuple[threading.Thread, list[socket.socket | OSError]]:
    outcome: list[socket.socket | OSError] = []

    def go() -> None:
        try:
            outcome.append(connect_authenticated(endpoint, key, rank, timeout_seconds=0.5))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    return thread, outcome


def admitted(listener: AuthenticatedListener, while_alive: threading.Thread) -> list[int]:
    ranks = []
    while while_alive.is_alive():
        for rank, connection in listener.admit(0.02):
            ranks.append(rank)
            connection.close()
    return ranks


@pytest.mark.parametrize(
    ("key", "passes"),
    [(KEY, True), (b"", False), (KEY[:-1], False)],
    ids=[
        "the key",
        "none",
        "part of it",
    ],  # a random key in a test's name would differ from process to process
)
def test_only_the_key_opens_the_door(listener: AuthenticatedListener, key: bytes, passes: bool) -> None:
    thread, outcome = entering(listener.endpoint, key, rank=7)
    assert admitted(listener, thread) == [7] * passes
    if passes:
        assert isinstance(outcome[0], socket.socket)
        outcome[0].close()
    else:
        assert "not this job's rank 0, or it has another key" in str(outcome[0])


def test_a_crowd_of_strangers_keeps_no_rank_out(listener: AuthenticatedListener) -> None:
    crowd = []
    for number in range(300):
        stranger = knock(listener.endpoint)
        stranger.settimeout(1)
        stranger.send((b"", b"\xff" * 8, b"\xff" * 68, os.urandom(4096))[number % 4] or b"\0")
        crowd.append(stranger)
        assert listener.admit() == []
    thread, outcome = entering(listener.endpoint, KEY, rank=1)
    assert admitted(listener, thread) == [1]
    assert isinstance(outcome[0], socket.socket)
    outcome[0].close()
    for stranger in crowd:
        stranger.close()


def test_a_rank_does_not_believe_who_has_not_the_key() -> None:
    """Whoever was first at the port: it echoes the challenge, or sends rubbish."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        endpoint = Endpoint("127.0.0.1", impostor.getsockname()[1])
        thread, outcome = entering(endpoint, KEY, rank=1)
        impostor.settimeout(0.1)
        while thread.is_alive():
            try:
                connection, _ = impostor.accept()
            except TimeoutError:
                continue
            with connection:
                connection.sendall(os.urandom(32))
                said = connection.recv(68)
                connection.sendall(said[36:])  # its own proof, back to it
    assert "does not hold this job's key" in str(outcome[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_another_user_is_sent_away_unheard() -> None:
    listener = AuthenticatedListener(THIS_HOST, b"", guests=2)
    program = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(chr(0) + sys.argv[1])\n"
        "try:\n"
        "    print(s.recv(32))\n"
        "except ConnectionResetError:\n"
        "    print(b'')\n"
    )
    name = f"d2ft_hpc/0/{THIS_HOST.address}"
    stranger = subprocess.Popen([sys.executable, "-c", program, name], stdout=subprocess.PIPE, text=True)
    while stranger.poll() is None:
        assert listener.admit(0.02) == []
    assert stranger.communicate()[0] == "b''\n"
    listener.close()


@pytest.fixture
def stores() -> list[JobStore]:
    """Of two ranks."""
    listener = AuthenticatedListener(THIS_HOST, KEY, guests=2)
    StoreServer(listener, world_size=2)
    return [JobStore(connect_authenticated(THIS_HOST, KEY, rank, 5), timeout_seconds=5) for rank in range(2)]


def test_the_store_answers_as_torchs_own(stores: list[JobStore]) -> None:
    def answers(one: Store, other: Store) -> list[object]:
        one.set("a", "1")
        one.set('b\n"ü', "text \xff")
        return [
            other.get("a"),
            other.get('b\n"ü'),
            one.add("count", 3),
            other.add("count", 4),
            one.get("count"),
            other.check(["a", "count"]),
            other.check(["a", "absent"]),
            other.compare_set("a", "1", "2"),
            other.compare_set("a", "1", "3"),
            other.compare_set("new", "", "4"),
            one.delete_key("a"),
            one.delete_key("a"),
            one.check(["a"]),
            one.num_keys(),
            other.wait(["new", "count"], timedelta(seconds=1)),
            one.append("grows", "a"),
            other.append("grows", "b"),
            one.multi_set(["x", "y"], ["1", "2"]),
            other.multi_get(["x", "grows", "y"]),
            other.has_extended_api(),
        ]

    reference = HashStore()
    assert answers(*stores) == answers(reference, reference)
    under_a_name = [PrefixStore("under a name", store) for store in (*stores, reference)]
    assert answers(*under_a_name[:2]) == answers(under_a_name[2], under_a_name[2])


def test_a_wait_ends_when_the_key_comes_or_in_time(stores: list[JobStore]) -> None:
    later = threading.Timer(0.2, lambda: stores[1].set("late", "here"))
    later.start()
    assert stores[0].get("late") == b"here"
    with pytest.raises(DistStoreError, match=r"timeout after 0\.1 s, keys: absent"):
        stores[0].wait(["absent"], timedelta(seconds=0.1))
    assert stores[0].get("late") == b"here"


def test_nobody_listens_when_all_have_come(stores: list[JobStore]) -> None:
    stores[0].set("a", "1")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            knock(THIS_HOST).close()
        except ConnectionRefusedError:
            break
    with pytest.raises(ConnectionRefusedError):
        connect_authenticated(THIS_HOST, KEY, 2, timeout_seconds=0.1)


def test_oversized_values_are_refused_on_both_sides(stores: list[JobStore]) -> None:
    with pytest.raises(DistStoreError, match="longer than the store's messages"):
        stores[0].set("big", "x" * LONGEST_MESSAGE_BYTES)
    stores[0].set("as big as it may be", bytes(LONGEST_MESSAGE_BYTES // 2))
    with suppress(OSError):
        stores[1]._connection.sendall(b"[" * (4 * LONGEST_MESSAGE_BYTES))
    with pytest.raises(DistNetworkError, match="lost the store of rank 0"):
        stores[1].get("as big as it may be")
    assert len(stores[0].get("as big as it may be")) == LONGEST_MESSAGE_BYTES // 2


def test_the_store_looks_again_only_at_those_that_wait_for_the_key_that_came(
    listener: AuthenticatedListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each key that any rank sets, a store that looked at all waiting ranks would work by the square of their
    number."""
    looks = 0
    own = StoreServer._look

    def counting(server: StoreServer, channel: object) -> None:
        nonlocal looks
        looks += 1
        own(server, channel)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreServer, "_look", counting)
    StoreServer(listener, 4)
    stores = [
        JobStore(connect_authenticated(listener.endpoint, KEY, rank, timeout_seconds=5), 5)
        for rank in range(4)
    ]
    waiting = [threading.Thread(target=store.wait, args=(["a", "b"],)) for store in stores[1:]]
    for thread in waiting:
        thread.start()
    while looks < 3:
        time.sleep(0.01)
    for other in range(50):
        stores[0].set(f"other {other}", "1")
    assert looks == 3
    stores[0].set("b", "1")
    assert looks == 3
    stores[0].set("a", "1")
    for thread in waiting:
        thread.join(5)
    assert looks == 6


def test_the_store_waits_for_a_key_that_was_deleted_meanwhile(listener: AuthenticatedListener) -> None:
    StoreServer(listener, 2)
    first, second = (
        JobStore(connect_authenticated(listener.endpoint, KEY, rank, timeout_seconds=5), 0.3)
        for rank in range(2)
    )
    first.set("a", "1")
    outcome: list[str] = []

    def wait() -> None:
        with suppress(DistStoreError):
            second.wait(["a", "b"])
            outcome.append("came")

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    first.delete_key("a")
    first.set("b", "1")
    thread.join(5)
    assert outcome == []
    first.set("a", "2")
    assert second.multi_get(["a", "b"]) == [b"2", b"1"]
