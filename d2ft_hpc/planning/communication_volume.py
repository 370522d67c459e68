"""How many bytes the engines send from one rank in a step under a plan. Planners and reports use the same model.

All counts are those of ring algorithms, as `metering.meter` counts them while a step runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Flags, Floats, Ints, Operations
from d2ft_hpc.planning.plan import Operation

DataParallel = Literal["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"]
"""How replicas reduce: torch's DistributedDataParallel, DeepSpeed without ZeRO or with one of its stages, FSDP2."""

ZERO: tuple[DataParallel, ...] = ("zero0", "zero1", "zero2", "zero3")
"""By stage."""

TokenLayout = Literal["replicated", "sharded", "overlapped"]
"""What tensor-parallel ranks hold between branches: every token, or each its own (`parallel.sharded_tokens`);
overlapped: each its own, and the messages of one half of a micro-batch are under way while the other is computed."""

LAYOUTS: tuple[TokenLayout, ...] = ("replicated", "sharded", "overlapped")

BRANCHES = 2
"""A block has two, attention and FFN. Each is one sum over the tensor-parallel ranks forward and one backward. Where a
single rank runs a block, both branches together are one."""


def ring_bytes(collective: str, payload_bytes: float, ranks: int) -> float:
    """Bytes that one rank sends, on average, for a collective over `payload_bytes` (the full tensor)."""
    if collective in ("send", "recv"):
        return payload_bytes if collective == "send" else 0
    share = (ranks - 1) / ranks
    return payload_bytes * (2 * share if collective == "allreduce" else share)


@dataclass(frozen=True)
class Replicas:
    """Data parallelism of one model (or of one rank's part of it).

    engine: any but "fsdp2", which has `fsdp2_bytes`.
    replicas: how many reduce together. slots: micro-batches of each in a step.
    gradient_bytes: of all trained parameters' gradients as they are reduced. parameter_bytes: of all parameters as
        they are gathered; updated_bytes: of the trained ones.
    kept_bytes: of the parameters that zero3 keeps whole between updates, as DeepSpeed does with small ones
        (stage3_param_persistence_threshold).
    """

    engine: DataParallel
    replicas: int
    slots: int
    gradient_bytes: float
    parameter_bytes: float
    updated_bytes: float
    kept_bytes: float = 0.0

    def bytes_of_step(self) -> dict[str, float]:
        """By collective, what one rank sends in a step. No plan changes it: a gradient that nobody computed is reduced
        as zeros, and a block that nobody runs is gathered, because the collectives' order is fixed.

        ddp and zero0 sum gradients once; zero1 sums them once and gathers what each rank updated; zero2 sums them in
        every micro-batch (DeepSpeed sums whole buckets, and each rank keeps its part); zero3 scatters the sums in
        every micro-batch and gathers the weights in each of them; weights that it keeps whole are gathered once. In
        the run's first step it gathers more, since it then learns their order.
        """
        sums = self.slots if self.engine == "zero2" else 1
        if self.engine == "zero3":
            spread_bytes = self.parameter_bytes - self.kept_bytes
            payloads = {
                "allgather": self.slots * spread_bytes + self.kept_bytes,
                "reduce_scatter": self.slots * self.gradient_bytes,
            }
        else:
            updated = 0.0 if self.engine in ("ddp", "zero0") else self.updated_bytes
            payloads = {"allreduce": sums * self.gradient_bytes, "allgather": updated}
        return {
            name: ring_bytes(name, payload, self.replicas) for name, payload in payloads.items() if payload
        }


def fsdp2_bytes(
    operations: Operations,
    replicas: int,
    gathered_bytes: Floats,
    reduced_bytes: Floats,
    gathers: int = 2,
    gathers_once: bool = False,
    reduces_once: bool = False,
) -> dict[str, float]:
    """By collective, what one rank sends in a step under FSDP2.

    operations: uint8 [row, block, head]. gathered_bytes: of the parameters, float64 [block + 1], the last of what is in
    no block. reduced_bytes: the same of the trained parameters' gradients.

    Each micro-batch gathers the blocks that some replica runs, for the forward and, if `gathers` is 2 and not 1, again
    for the backward, and scatters the sums of their gradients; what is in no block is gathered once. gathers_once: only
    the first micro-batch that runs a block gathers it. reduces_once: only the last micro-batch scatters, and also
    runs the blocks that wait for that.
    """
    slots = len(operations) // replicas
    runs = _by_slot(operations != Operation.SHORTCUT, replicas)
    if reduces_once:
        runs[-1] |= _by_slot(operations == Operation.FULL, replicas).any(axis=0)
    gathered = runs.any(axis=0) if gathers_once else runs.sum(axis=0)
    reduced = runs[-1] if reduces_once else runs.sum(axis=0)
    payloads = {
        "allgather": np.append(gathers * gathered, 1 if gathers_once else slots) @ gathered_bytes,
        "reduce_scatter": np.append(reduced, 1 if reduces_once else slots) @ reduced_bytes,
    }
    return {name: ring_bytes(name, float(payload), replicas) for name, payload in payloads.items()}


def _by_slot(cells: Flags, replicas: int) -> Flags:
    """cells: bool [row, block, head]. Returns bool [slot, block]: whether some head of some replica is among them."""
    return np.asarray(cells.reshape(-1, replicas, *cells.shape[1:]).any(axis=(1, 3)), dtype=bool)


def reduces_trained_blocks_only(engine: DataParallel, precision: str) -> bool:
    """Whether the engine reduces no gradients of blocks that no replica trains. DDP and ZeRO reduce whole buckets of
    neighbouring parameters, and in bf16 DeepSpeed's optimiser reduces its own copies: there a plan changes no
    bytes."""
    return engine == "zero0" and precision == "fp32"


def shares_of_senders(layout: TokenLayout, ranks: int) -> Floats:
    """What all tensor-parallel ranks together send for a block in one direction, as a share of what they send if all
    of them have an active head: float64 [active, senders], numbers of ranks with a head that runs forward, and with one
    that runs in that direction.

    replicated: an all-reduce for each branch; where only one rank sends, a broadcast with half of its bytes. sharded:
    every sender receives the others' tokens and returns their partial sums. A rank that is alone active in a block
    does so once for the whole block.
    """
    senders = np.arange(ranks + 1.0)
    if layout != "replicated" or ranks == 1:
        shares = senders / ranks
    else:
        shares = np.where(senders == 1, 0.5, np.minimum(senders, 1.0))
    return _once_a_block(shares)


def busiest_shares(layout: TokenLayout, ranks: int) -> Floats:
    """What the busiest rank's link carries for a block, as a share of one micro-batch's activations: float64 [active,
    senders], as `shares_of_senders`. This decides how long messages take. sharded: a sender first gets the tokens of
    all other ranks, and later returns their sums.
    """
    senders = np.arange(ranks + 1.0)
    if ranks == 1:
        shares = np.zeros(2)
    elif layout != "replicated":
        shares = np.where(senders > 0, 2 * (ranks - 1) / ranks, 0.0)
    else:
        shares = np.where(senders > 1, 2 * (ranks - 1) / ranks, np.minimum(senders, 1.0))
    return BRANCHES * _once_a_block(shares)


def _once_a_block(shares: Floats) -> Floats:
    """shares: float64 [senders] of a branch; float64 [active, senders] of a block over that of all its branches."""
    ranks = len(shares) - 1
    table = np.tile(shares, (ranks + 1, 1))
    if ranks > 1:
        table[1] /= BRANCHES
    return table


@dataclass(frozen=True, eq=False)
class ByDirection:
    """A value for every row and block, forward and backward: float64 [row, block] each."""

    forward: Floats
    backward: Floats


def tensor_parallel_bytes(
    operations: Operations,
    owner: Ints,
    ranks: int,
    activation_bytes: float,
    layout: TokenLayout = "replicated",
) -> ByDirection:
    """What each rank of a tensor-parallel group sends, on average.

    operations: uint8 [row, block, head]. owner: int64 [block, head], the rank of each head.
    activation_bytes: of one row's activations between blocks (samples x tokens x width x bytes of a number).

    A (row, block) whose heads are all SHORTCUT sends nothing forward, one without FULL heads sends nothing backward
    (`shares_of_senders`). In the sharded layout ranks count as if they held equally many tokens, which differ by one at
    most. Raises PlanError if the owner map does not fit.
    """
    dense = BRANCHES * ring_bytes("allreduce", activation_bytes, ranks)
    return _by_senders(operations, owner, ranks, dense * shares_of_senders(layout, ranks))


def tensor_parallel_seconds(
    operations: Operations,
    owner: Ints,
    ranks: int,
    activation_bytes: float,
    layout: TokenLayout,
    *,
    seconds_per_byte: float,
    latency: float,
) -> ByDirection:
    """How long the messages of `tensor_parallel_bytes` take over links that carry a byte in `seconds_per_byte` each
    way at once. latency: of a branch's messages in one direction, seconds."""
    shares = busiest_shares(layout, ranks)
    messages = BRANCHES * _once_a_block(np.ones(ranks + 1)) * (shares > 0) * (1 + (layout == "overlapped"))
    seconds = shares * activation_bytes * seconds_per_byte + messages * latency
    return _by_senders(operations, owner, ranks, seconds)


def pipeline_bytes(slots: int, activation_bytes: float, gradients: int | None = None) -> float:
    """What the two stages at a boundary send each other in a step: the activations of every micro-batch forward, and
    of `gradients` of them (None: all) the gradients back."""
    return float((slots + (slots if gradients is None else gradients)) * activation_bytes)


def active_and_full_ranks(operations: Operations, owner: Ints, ranks: int) -> tuple[Ints, Ints]:
    """How many ranks have a head that is not SHORTCUT, and a FULL one: int64 [row, block] each."""
    is_held = [owner == rank for rank in range(ranks)]
    active, full = (
        np.sum([(runs & held).any(axis=2) for held in is_held], axis=0)
        for runs in (operations >= Operation.FORWARD_ONLY, operations == Operation.FULL)
    )
    return active, full


def _by_senders(operations: Operations, owner: Ints, ranks: int, of_senders: Floats) -> ByDirection:
    """of_senders: float64 [active, senders], as `shares_of_senders`."""
    if owner.shape != operations.shape[1:] or owner.min() < 0 or owner.max() >= ranks:
        raise PlanError(
            f"An owner map of shape {owner.shape} with ranks {owner.min()} to {owner.max()} does not fit "
            f"{operations.shape[1]} blocks x {operations.shape[2]} heads on {ranks} ranks."
        )
    active, full = active_and_full_ranks(operations, owner, ranks)
    return ByDirection(of_senders[active, active], of_senders[active, full])
