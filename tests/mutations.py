"""Damage of every kind, the same at every run, and what a reader of damaged files owes its user."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2ft_hpc.errors import D2ftError

_NUMBERS = (0, 1, 0xFF, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
_ROOM_BYTES = 3 << 30


def mutated(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged copies: flipped bits, sizes and types written over, pieces cut off, doubled, swapped or zeroed.

    Half of the damage is in the first 4 KiB, where most formats describe what follows.
    """
    chance = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        reach = len(damaged) if chance.random() < 0.5 else min(len(damaged), 4096)
        place = chance.randrange(reach)
        kind = chance.choice(
            ["bit", "bits", "cut", "zeros", "ones", "number", "doubled", "inserted", "swapped"]
        )
        if kind == "bit":
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == "bits":
            for _ in range(chance.randrange(2, 20)):
                damaged[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del damaged[place:]
        elif kind in ("zeros", "ones"):
            length = min(chance.choice([1, 8, 64, 512]), len(damaged) - place)
            damaged[place : place + length] = (b"\0" if kind == "zeros" else b"\xff") * length
        elif kind == "number":
            number = chance.choice(_NUMBERS).to_bytes(8, "little")[: chance.choice([2, 4, 8])]
            place -= place % 4
            damaged[place : place + len(number)] = number
        elif kind == "doubled":
            damaged[place:place] = damaged[place : place + chance.randrange(1, 200)]
        elif kind == "inserted":
            damaged[place:place] = chance.randbytes(chance.randrange(1, 30))
        else:
            other, length = chance.randrange(len(damaged)), chance.choice([1, 8, 64])
            damaged[place : place + length], damaged[other : other + length] = (
                damaged[other : other + length],
                damaged[place : place + length],
            )
        yield bytes(damaged)


def read_each(path: Path, copies: Iterator[bytes], read: Callable[[Path], object], words: str = "") -> int:
    """Reads every copy as the file at `path`; asserts that what is refused is told in one short line with its name.

    words: what else than the file's name may tell which file it is. Returns how many were refused.
    """
    refused = 0
    with _limited_memory():
        for copy in copies:
            path.write_bytes(copy)
            try:
                read(path)
            except D2ftError as error:
                refused += 1
                text = str(error)
                assert str(path) in text or (words and words in text), text
                assert len(text) < 500 + len(str(path)), text
                assert "\n" not in text, text
    return refused


@contextmanager
def _limited_memory() -> Iterator[None]:
    """So that what allocates on the word of a damaged file fails instead of taking the machine's memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
