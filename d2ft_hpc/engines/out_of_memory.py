"""A step in which a rank runs out of memory is undone on all ranks, so that it can be repeated under another plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from d2ft_hpc.engines.engine import MemoryShortError, ShortOfMemory

T = TypeVar("T")


def repeatable(short_of_memory: ShortOfMemory | None, undo: Callable[[], None], passes: Callable[[], T]) -> T:
    """What `passes` returns: the forwards and backwards of a batch, which exchange nothing between ranks.

    short_of_memory: None: a rank that runs out of memory ends the job. undo: forgets the gradients.
    Raises MemoryShortError on all ranks if one of them ran out of memory inside; random states are as before then.
    """
    if short_of_memory is None:
        return passes()
    on_gpu = torch.cuda.is_available()
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None
    done: T | None = None
    is_short = False
    try:
        done = passes()
    except torch.OutOfMemoryError:
        is_short = True
    # Outside of the except clause, because the error's frames hold the activations.
    ranks = short_of_memory(is_short)
    if not ranks:
        assert done is not None
        return done
    undo()
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
        torch.cuda.empty_cache()
    raise MemoryShortError(ranks)
