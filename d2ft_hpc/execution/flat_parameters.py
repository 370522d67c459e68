"""A block's parameters as few flat ones, from which its modules get views while it runs.

DeepSpeed and FSDP2 spend Python's time on each parameter in each step: a hook, copies, norms, a place in a bucket. A
ViT-B has 148, and that time is the same for every size of image, so that a step under a plan waits for Python. With one
flat parameter for each of a block's groups of the optimiser there are a few dozen. PyTorch's first FSDP had flat
parameters for the same reason.

Outside of a block's run its modules hold placeholders without memory. `unflattened` gives them parameters of their
own, in the same memory, and `split` and `join` translate whatever is named by parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.execution.gradients import Owners, stand_ins


@dataclass(frozen=True)
class _Part:
    """One parameter of a block: its module, its name there, its name in the model."""

    module: nn.Module
    name: str
    path: str
    shape: torch.Size


@dataclass(frozen=True, eq=False)
class _Flat:
    """One flat parameter, which a block holds under a name of its own."""

    block: nn.Module
    name: str
    path: str
    parts: Sequence[_Part]

    @property
    def parameter(self) -> nn.Parameter:
        """The one that the block holds now; engines put others in its place."""
        parameter = self.block._parameters[self.name]
        assert parameter is not None
        return parameter

    @property
    def owners(self) -> Owners:
        """Where each part's module finds it."""
        return [(vars(part.module), part.name) for part in self.parts]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each part's view of a tensor of the flat parameter's length."""
        pieces = flat.split([part.shape.numel() for part in self.parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]


Blocks = Mapping[int, nn.Module]
"""By index."""


class FlatParameters:
    """The flat parameters of a model's blocks.

    Made once, of a model whose parameters lie whole on this rank, before an engine spreads or copies them.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, optimizer: Optimizer) -> None:
        """Puts flat parameters in the place of those of `blocks` that `optimizer`, which has no state yet, steps: one
        for each block, group of the optimiser and dtype."""
        paths = {id(module): path for path, module in model.named_modules()}
        self._of_block: dict[int, list[_Flat]] = {index: [] for index in blocks}
        self._is_unflattened = False
        block_of = {
            id(parameter): index for index, block in blocks.items() for parameter in block.parameters()
        }
        shared = _shared(model)
        for group in optimizer.param_groups:
            others: list[nn.Parameter] = []
            alike: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                index = block_of.get(id(parameter))
                if index is None or id(parameter) in shared:
                    others.append(parameter)
                else:
                    alike.setdefault((index, parameter.dtype), []).append(parameter)
            flats = [
                self._flatten(blocks[index], index, parameters, paths)
                for (index, _), parameters in alike.items()
            ]
            # First, because engines lay a group's parameters one after the other: behind the ten numbers of a
            # classifier's bias, products read weights at odd addresses, which takes twice the time.
            group["params"] = flats + others

    def _flatten(
        self, block: nn.Module, index: int, parameters: list[nn.Parameter], paths: Mapping[int, str]
    ) -> nn.Parameter:
        wanted = {id(parameter) for parameter in parameters}
        found = [
            (_Part(module, name, f"{paths[id(module)]}.{name}", parameter.shape), parameter)
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in wanted
        ]
        parts = [part for part, _ in found]
        parameter = nn.Parameter(torch.cat([parameter.detach().flatten() for _, parameter in found]))
        number = len(self._of_block[index])
        flat = _Flat(block, f"flat_{number}", f"{paths[id(block)]}.flat_{number}", parts)
        self._of_block[index].append(flat)
        block.register_parameter(flat.name, parameter)
        for part in parts:
            del part.module._parameters[part.name]
        _leave_placeholders(flat)
        return parameter

    @contextmanager
    def placed(self, index: int) -> Iterator[None]:
        """Inside, the modules of block `index` find views of what the block holds now as their parameters."""
        if self._is_unflattened:
            yield
            return
        flats = self._of_block[index]
        owners = [owner for flat in flats for owner in flat.owners]
        with stand_ins(owners, [view for flat in flats for view in flat.views(flat.parameter)]):
            yield

    @property
    def is_unflattened(self) -> bool:
        return self._is_unflattened

    @contextmanager
    def unflattened(self) -> Iterator[None]:
        """Inside, the model has the parameters that it had before, in the memory of the flat ones, and not these. Only
        where an engine leaves them whole."""
        if self._is_unflattened:
            yield
            return
        flats = {flat: flat.parameter for flat in self._all()}
        for flat, parameter in flats.items():
            del flat.block._parameters[flat.name]
            for part, view in zip(flat.parts, flat.views(parameter.detach()), strict=True):
                del vars(part.module)[part.name]
                part.module.register_parameter(part.name, nn.Parameter(view, parameter.requires_grad))
        self._is_unflattened = True
        try:
            yield
        finally:
            self._is_unflattened = False
            for flat, parameter in flats.items():
                flat.block.register_parameter(flat.name, parameter)
                for part in flat.parts:
                    del part.module._parameters[part.name]
                _leave_placeholders(flat)

    def split(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is named by the model's parameters now, under the names of before; views of the same memory."""
        by_path = {flat.path: flat for flat in self._all()}
        result: dict[str, Tensor] = {}
        for name, tensor in named.items():
            flat = by_path.get(name)
            if flat is None:
                result[name] = tensor
            else:
                views = flat.views(tensor)
                result.update({part.path: view for part, view in zip(flat.parts, views, strict=True)})
        return result

    def check_parts(self, named: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError where a part is missing or has another shape."""
        for part in (part for flat in self._all() for part in flat.parts):
            if part.path not in named or named[part.path].shape != part.shape:
                raise CheckpointError(
                    f"the checkpoint is of another model: {part.path!r} is missing or has another shape"
                )

    def join(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `split`, copied; a flat parameter some part of which is not named is left out."""
        result = dict(named)
        for flat in self._all():
            parts = [result.pop(part.path, None) for part in flat.parts]
            whole = [part.flatten() for part in parts if part is not None]
            if len(whole) == len(parts):
                result[flat.path] = torch.cat(whole)
        return result

    def _all(self) -> list[_Flat]:
        return [flat for flats in self._of_block.values() for flat in flats]


def _leave_placeholders(flat: _Flat) -> None:
    """Tensors of the parts' shapes that hold nothing; most operators fail on them, where a block is read by mistake."""
    for part, (kept, name) in zip(flat.parts, flat.owners, strict=True):
        kept[name] = torch.empty(part.shape, dtype=flat.parameter.dtype, device="meta")


def _shared(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):  # a module may be held twice, too
        for parameter in module._parameters.values():
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
