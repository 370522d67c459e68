"""A process that sends rubbish to whatever the processes with a mark in their environment listen on: attacker.py MARK.

It prints what it has attacked, each once, until it is killed: "tcp ADDRESS PORT" or "unix NAME".
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

RUBBISH = (
    b"",  # says nothing and stays
    b"\xff" * 8 + os.urandom(4096),  # a huge length before random bytes
    b"GET / HTTP/1.1\r\n\r\n",
    b'["set", "rank 0", "AAAA"]\n',
    b"[" * 2_000_000,
    b"\x00\x7b\x5e\xa1\x3c" * 64,
)
LISTENING = "0A"


def sockets_of(process: Path) -> set[str]:
    """Inodes."""
    found = set()
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    return found


def listening(inodes: set[str]) -> Iterator[tuple[str, str, int]]:
    """TCP sockets among the inodes that listen: the family, address and port."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                address, port = fields[1].split(":")
                raw = bytes.fromhex(address)
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]  # each in the host's order
                yield name, socket.inet_ntop(family, b"".join(words)), int(port, 16)


def unix_doors(inodes: set[str]) -> Iterator[str]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[6] in inodes and fields[7].startswith("@d2ft_hpc/"):
            yield fields[7]


def marked(mark: bytes) -> Iterator[Path]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield entry


def throw(target: socket.socket, address: object, rubbish: bytes) -> socket.socket:
    target.settimeout(0.05)
    with suppress(OSError):
        target.connect(address)  # type: ignore[arg-type]
        target.sendall(rubbish)
    return target


def main() -> None:
    mark = sys.argv[1].encode()
    attacked: dict[str, int] = {}
    held: list[socket.socket] = []
    while True:
        for process in marked(mark):
            with suppress(OSError):
                inodes = sockets_of(process)
                targets: list[tuple[str, socket.AddressFamily, object]] = [
                    (
                        f"{name} {address} {port}",
                        socket.AF_INET if name == "tcp" else socket.AF_INET6,
                        (address, port),
                    )
                    for name, address, port in listening(inodes)
                ]
                targets += [(f"unix {n}", socket.AF_UNIX, "\0" + n[1:]) for n in unix_doors(inodes)]
                for told, family, address in targets:
                    times = attacked[told] = attacked.get(told, 0) + 1
                    if times == 1:
                        print(told, flush=True)
                    held.append(throw(socket.socket(family), address, RUBBISH[times % len(RUBBISH)]))
                    del held[:-500]
        time.sleep(0.01)


if __name__ == "__main__":
    main()
