"""Blocks as CUDA graphs under any engine: a block's forward is one launch and its backward another, while the gradients
of its parameters go through autograd, so that what an engine hooks there fires as always.

The blocks of a model form a chain: each reads what the one below wrote. A chain is captured whole, forwards from the
first block to the last and backwards in turn, out of one memory pool, which all chains share, so that they take as
much memory as an eager pass. Where an engine allows, the graphs add to gradients where these lie, in one place for all
chains, and autograd gets the very tensors, which cost no launch. What a chain keeps for its backward lies where the
next pass of the same model writes; a pass that begins while an earlier one still waits for its backward therefore runs
without graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from d2ft_hpc.execution.accumulation import Accumulator, add, let_accumulate
from d2ft_hpc.execution.gradients import Owners
from d2ft_hpc.execution.gradients import stand_ins as standing_in

_WARM_UPS = 3
"""Runs before a capture, in which kernels compile, choose algorithms and allocate their workspaces."""

MOST_CHAINS = 8
"""Number of chains that are kept; passes of further shapes run without graphs."""


class GradientPlace(Enum):
    """Where the graphs leave gradients of parameters."""

    COPIED = (
        "in tensors of each chain, from which autograd copies them: a `.grad` may be kept from step to step"
    )
    OWN = "in the graphs' own tensors, which become the `.grad`: none may be read after the next backward"
    OF_ENGINE = "where the engine keeps each `.grad` from step to step (DDP's buckets)"


_MOST_ADOPTIONS = 4
"""How often graphs are captured anew because an engine has moved gradients, as DDP does in its first steps."""

Compute = Callable[[Tensor, Tensor | None], Tensor]
"""A block's forward on its modules' parameters, from its input and the indices of the row's heads."""


@dataclass(frozen=True)
class Link:
    """One block of a chain.

    owners: of all its parameters. gives_zeros: gradients of parameters that take none are zero instead of absent.
    """

    compute: Compute
    owners: Owners
    gives_zeros: bool

    @property
    def parameters(self) -> list[Tensor]:
        return [kept[name] for kept, name in self.owners]


Links = dict[int, Link]
"""By block, from the first to the last."""


class BlockGraphs:
    """The chains of one model's blocks, by their shapes.

    copies_weights: an engine puts the weights elsewhere in memory for each pass (ZeRO 3, FSDP2), so that each block's
        are copied to where the graphs read.
    """

    def __init__(
        self, copies_weights: bool = False, gradient_place: GradientPlace = GradientPlace.COPIED
    ) -> None:
        self._copies_weights, self._gradient_place = copies_weights, gradient_place
        self._gradients: dict[tuple[int, int], Tensor] = {}  # by block and number, unless they are copied
        self._adoptions = 0
        self._chains: dict[Hashable, _Chain] = {}
        self._pool: Any = None
        self._pass: weakref.ref[Pass] | None = None
        self._weights: list[Tensor] | None = None

    def begin(
        self,
        key: Hashable,
        x: Tensor,
        indices: Tensor | None,
        beside: Sequence[Tensor],
        make_links: Callable[[Sequence[Tensor]], Links],
    ) -> Pass | None:
        """A pass on input `x` through the graphs of earlier passes with this key, or through new graphs of the links
        that `make_links` returns; None if the pass has to run without graphs. beside: what all blocks get beside x;
        `make_links` gets the tensors from which the graphs read it."""
        if self._pass is not None and self._pass() is not None:
            return None
        chain = self._chains.get(key)
        if chain is not None and (chain.places != self._places(chain.links) or self._moved_gradients(chain)):
            # Weights or gradients have moved, or other weights train: every chain reads or writes them.
            self._chains.clear()
            self._gradients.clear()
            self._pool = chain = None  # a pool ends with its last graph,
            torch.cuda.empty_cache()  # and its memory is of no use to anything else
        if chain is None:
            if len(self._chains) == MOST_CHAINS:
                return None
            read = [tensor.clone() for tensor in beside]
            chain = self._chains[key] = self._capture(x, indices, read, make_links(read))
        running = chain.begin(indices, beside)
        self._pass = weakref.ref(running)
        return running

    def _moved_gradients(self, chain: _Chain) -> bool:
        """Whether to capture again after an engine has moved gradients."""
        if self._gradient_place is not GradientPlace.OF_ENGINE or self._adoptions == _MOST_ADOPTIONS:
            return False
        moved = any(block.found_others for block in chain.blocks.values())
        self._adoptions += moved
        return moved

    def _gradients_of(self, index: int, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Where the graphs add to gradients of block `index`; None for a parameter that takes none, and where autograd
        copies them."""
        if self._gradient_place is GradientPlace.COPIED:
            return [None] * len(parameters)
        places: list[Tensor | None] = []
        for number, parameter in enumerate(parameters):
            if not parameter.requires_grad:
                places.append(None)
                continue
            key = index, number
            if key not in self._gradients:
                is_kept = self._gradient_place is GradientPlace.OF_ENGINE and parameter.grad is not None
                self._gradients[key] = (
                    parameter.grad.detach()  # type: ignore[union-attr]
                    if is_kept
                    else torch.zeros_like(parameter, requires_grad=False)
                )
            places.append(self._gradients[key])
        return places

    def _places(self, links: Links) -> list[int | bool]:
        """Where the graphs read the weights, and which of these train."""
        parameters = [parameter for link in links.values() for parameter in link.parameters]
        if self._copies_weights:
            return [parameter.requires_grad for parameter in parameters]
        return [place for p in parameters for place in (p.data_ptr(), p.requires_grad)]

    def _stand_ins(self, link: Link) -> list[nn.Parameter]:
        """Leaves with the parameters' values, at the place from which the graphs read them."""
        own = link.parameters
        places = [parameter.detach() for parameter in own]
        if self._copies_weights:
            if self._weights is None:  # the first block's are in place now, the others' are not
                self._weights = [parameter.clone() for parameter in places]
            places = self._weights
        return [
            nn.Parameter(place, requires_grad=parameter.requires_grad)
            for place, parameter in zip(places, own, strict=True)
        ]

    def _capture(self, x: Tensor, indices: Tensor | None, beside: Sequence[Tensor], links: Links) -> _Chain:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        read = None if indices is None else indices.clone()
        x = x.detach().clone().requires_grad_(x.requires_grad)
        blocks: dict[int, _BlockGraph] = {}
        passed: dict[int, tuple[Tensor, Tensor, list[nn.Parameter], list[Accumulator | None]]] = {}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index, link in links.items():
                stand_ins = self._stand_ins(link)
                places = self._gradients_of(index, link.parameters)
                _accumulate(
                    stand_ins, [None if place is None else torch.zeros_like(place) for place in places]
                )
                for _ in range(_WARM_UPS):
                    _both(link, stand_ins, x, read)
                accumulators = _accumulate(stand_ins, places)
                with _captured(self._pool) as forward:
                    y = _on(link, stand_ins, x, read)
                weights = stand_ins if self._copies_weights else []
                blocks[index] = _BlockGraph(forward, x.detach(), y.detach(), [w.detach() for w in weights])
                passed[index] = x, y, stand_ins, accumulators
                x = y.detach().requires_grad_(y.requires_grad)
                vars(x).update(vars(y))  # what a fused block computes ahead for the next one
            gradient = top = torch.empty_like(x)
            for index in reversed(links):
                x, y, stand_ins, accumulators = passed.pop(index)
                block, gives_zeros = blocks[index], links[index].gives_zeros
                found: list[Tensor | None] = [None] * len(stand_ins)
                if y.requires_grad:
                    with _no_autocast(), _captured(self._pool) as block.backward:
                        of_x, found = _gradients(y, x, stand_ins, gradient)
                        found = _added(found, accumulators)
                    block.of_y, block.of_x = _unowned(gradient), None if of_x is None else _unowned(of_x)
                    block.of_y_sum = _sum_left_with(gradient)
                    gradient = gradient if of_x is None else of_x
                del y  # this also frees what the forward kept: later chains of the pool may use that memory
                block.adds = self._gradient_place is not GradientPlace.COPIED
                block.of_parameters = [
                    _zeros(p, accumulator) if part is None and gives_zeros and p.requires_grad else part
                    for p, part, accumulator in zip(stand_ins, found, accumulators, strict=True)
                ]
                del found
        torch.cuda.current_stream().wait_stream(stream)
        return _Chain(links, blocks, read, beside, self._places(links), top)


@contextmanager
def _captured(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is launched inside on the current stream; other threads may go on using the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield graph
    finally:
        graph.capture_end()


def _no_autocast() -> torch.autocast:
    """Inside, autocast is off as in a backward pass, which runs outside of the forward's autocast."""
    return torch.autocast("cuda", enabled=False)


def _on(link: Link, stand_ins: Sequence[Tensor], x: Tensor, indices: Tensor | None) -> Tensor:
    dtype, is_on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    # A weight in autocast's cache would be gone when the graph reads it.
    with standing_in(link.owners, stand_ins), torch.autocast("cuda", dtype, is_on, cache_enabled=False):
        return link.compute(x, indices)


def _gradients(
    y: Tensor, x: Tensor, stand_ins: Sequence[Tensor], of_y: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of a block's input and of its parameters; None of those that take none or get none."""
    wanted = [tensor for tensor in (x, *stand_ins) if tensor.requires_grad]
    parts = iter(torch.autograd.grad(y, wanted, of_y, allow_unused=True))
    of_x = next(parts) if x.requires_grad else None
    return of_x, [next(parts) if p.requires_grad else None for p in stand_ins]


def _sum_left_with(gradient: Tensor) -> Tensor | None:
    """The sum that a fused block has stored with its input's gradient for the block below."""
    summed = getattr(gradient, "_d2ft_summed", None)
    return None if summed is None else summed.sum


def _accumulate(
    stand_ins: Sequence[nn.Parameter], places: Sequence[Tensor | None]
) -> list[Accumulator | None]:
    """Lets gradients be added to the places, where there are any."""
    accumulators = [None if place is None else Accumulator(place) for place in places]
    for parameter, accumulator in zip(stand_ins, accumulators, strict=True):
        if accumulator is not None:
            let_accumulate(parameter, accumulator)
    return accumulators


def _added(parts: Sequence[Tensor | None], accumulators: Sequence[Accumulator | None]) -> list[Tensor | None]:
    """Adds what autograd gave to the places. Returns each parameter's gradient, or the place that has it."""
    add(parts, accumulators)
    return [
        part if accumulator is None else accumulator.place if accumulator.got_any else None
        for accumulator, part in zip(accumulators, parts, strict=True)
    ]


def _zeros(parameter: Tensor, accumulator: Accumulator | None) -> Tensor:
    """A gradient of zeros; the place, which is cleared before a pass adds to it."""
    return torch.zeros_like(parameter) if accumulator is None else accumulator.place


class _Memory:
    """Memory on a GPU that somebody else owns."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes(),),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "version": 3,
        }


def _unowned(tensor: Tensor) -> Tensor:
    """A tensor in the same memory, which the graphs' pool may give to whatever is captured from now on."""
    flat = torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _both(link: Link, stand_ins: Sequence[Tensor], x: Tensor, indices: Tensor | None) -> None:
    y = _on(link, stand_ins, x, indices)
    if y.requires_grad:
        with _no_autocast():
            _gradients(y, x, stand_ins, torch.zeros_like(y))


@dataclass
class _BlockGraph:
    """A captured block: what its graphs read and write."""

    forward: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    weights: list[Tensor]
    backward: torch.cuda.CUDAGraph | None = None
    of_y: Tensor | None = None
    of_y_sum: Tensor | None = None
    """Where the block above leaves the sum of `of_y` over samples and tokens, [channel], if the backward reads it."""
    of_x: Tensor | None = None
    of_parameters: Sequence[Tensor | None] = ()
    """For each parameter its gradient, or the place of it."""
    adds: bool = False
    """The backward adds to what is in the gradients' places."""
    found_others: bool = False
    """Whether a parameter had a gradient in another place."""

    @property
    def takes_gradients(self) -> bool:
        """Whether there is anything to hand to autograd in the backward."""
        return self.backward is not None or bool(self.of_parameters)

    def run_forward(self, parameters: Sequence[Tensor]) -> Tensor:
        self._copy_weights(parameters)
        self.forward.replay()
        return self.y.detach()

    def run_backward(
        self, gradient: Tensor, is_from_above: bool, parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Returns what autograd takes as the gradients of the parameters. is_from_above: whether the gradient is the
        tensor that the block above has written, in its place."""
        # The tensors that the chain holds too: autograd then copies them. It would take over a tensor that nobody
        # else holds, and the next replay would overwrite a parameter's gradient.
        handed = self._cleared(parameters) if self.adds else list(self.of_parameters)
        if self.backward is not None:
            assert self.of_y is not None
            if not is_from_above:
                self.of_y.copy_(gradient)
                if self.of_y_sum is not None:
                    self.of_y_sum.copy_(gradient.flatten(0, -2).sum(0, dtype=self.of_y_sum.dtype))
            self._copy_weights(parameters)
            self.backward.replay()
        return handed

    def _cleared(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Makes the places ready to be added to. Returns what autograd takes over as `.grad`, without a copy because
        it is held nowhere else; a gradient that lies elsewhere gets the sum added."""
        handed: list[Tensor | None] = []
        empty: list[Tensor] = []
        for parameter, place in zip(parameters, self.of_parameters, strict=True):
            if place is None:
                handed.append(None)
                continue
            before = parameter.grad
            if before is not None and before.data_ptr() == place.data_ptr():
                parameter.grad = None  # for autograd to put the same memory there again
                handed.append(place.detach())
                continue
            empty.append(place)
            if before is None:
                handed.append(place.detach())
            else:
                self.found_others = True
                handed.append(place)
        if empty:
            torch._foreach_zero_(empty)
        return handed

    def _copy_weights(self, parameters: Sequence[Tensor]) -> None:
        if self.weights:
            torch._foreach_copy_(self.weights, [parameter.detach() for parameter in parameters])


class _Chain:
    """Captured blocks, and where the parameters of all of `links` were."""

    def __init__(
        self,
        links: Links,
        blocks: dict[int, _BlockGraph],
        indices: Tensor | None,
        beside: Sequence[Tensor],
        places: list[int | bool],
        top: Tensor,
    ) -> None:
        self.links, self.blocks, self.places, self._top = links, blocks, places, top
        for block in blocks.values():  # their memory is free for other chains of the pool
            block.y = _unowned(block.y)
        for below, block in pairwise(blocks.values()):
            block.x = below.y
        self._indices, self._given = indices, indices
        self._beside = beside

    def begin(self, indices: Tensor | None, beside: Sequence[Tensor]) -> Pass:
        if self._indices is not None and indices is not None and indices is not self._given:
            self._indices.copy_(indices)
            self._given = indices
        if beside:
            torch._foreach_copy_(list(self._beside), list(beside))
        return Pass(self)


class Pass:
    """One forward through a chain. It lives until all of its backward passes have run or were given up."""

    def __init__(self, chain: _Chain) -> None:
        self._chain = chain
        self._first = next(iter(chain.blocks))
        self._left: tuple[int, int] | None = None

    def leave(self, tensor: Tensor | None) -> None:
        """What the block has just written for its neighbour: a result, or a gradient."""
        self._left = None if tensor is None else (tensor.data_ptr(), tensor._version)

    def was_left(self, tensor: Tensor) -> bool:
        """Whether this is the tensor that the neighbour has written, in its place and unchanged."""
        return (tensor.data_ptr(), tensor._version) == self._left

    def run(self, index: int, x: Tensor) -> Tensor | None:
        """Block `index`; None if it has to run by itself, because its input is not what the block below gave."""
        block = self._chain.blocks[index]
        if index == self._first:
            block.x.copy_(x)
        elif not self.was_left(x) or x.shape != block.x.shape:
            return None
        parameters = self._chain.links[index].parameters
        if block.takes_gradients:
            result: Tensor = _Replay.apply(self, block, x, *parameters)
        else:
            with torch.no_grad():
                result = block.run_forward(parameters)
        self.leave(result)
        return result


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, running: Pass, block: _BlockGraph, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.running, ctx.block = running, block
        ctx.parameters = parameters if block.weights or block.adds else ()
        return block.run_forward(parameters)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        running: Pass | None = ctx.running
        if running is None:
            raise RuntimeError(
                "a second backward through blocks that run as CUDA graphs: what the forward kept may be overwritten; "
                "attach(model, cuda_graphs=False)"
            )
        block: _BlockGraph = ctx.block
        handed = block.run_backward(gradient, running.was_left(gradient), ctx.parameters)
        running.leave(block.of_x)
        ctx.running = ctx.parameters = None
        return None, None, block.of_x, *handed
