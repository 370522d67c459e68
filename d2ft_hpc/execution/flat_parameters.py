"""A block's parameters as few flat ones, from which its modules get views while it runs.

DeepSpeed and FSDP2 spend Python's time on each parameter in each step: a hook, copies, norms, a place in a bucket. A
ViT-B has 148, and that time is the same for every size of image, so that a step under a plan waits for Python. With one
flat parameter for each of a block's groups of the optimiser there are a few dozen. PyTorch's first FSDP had flat
parameters for the same reason.

Outside of a block's run its modules hold placeholders without memory, or, where a script of the user's own may look at
them, the parameters that they had before, in the memory of the flat ones. `unflattened` has the blocks run on these,
and `split` and `join` translate whatever is named by parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.execution.accumulation import Accumulator, accumulator_of, let_accumulate, take_apart
from d2ft_hpc.execution.gradients import Owners, stand_ins


@dataclass(frozen=True)
class Part:
    """One parameter of a block: its module, its name there, its name in the model.

    begin: its place in the flat parameter. parameter: as it was, where scripts may look at it; else None."""

    module: nn.Module
    name: str
    path: str
    shape: torch.Size
    begin: int
    parameter: nn.Parameter | None


@dataclass(eq=False)
class _Flat:
    """One flat parameter, which a block holds under a name of its own, or nobody but this where it is hidden."""

    block: nn.Module
    name: str
    path: str
    parts: Sequence[Part]
    is_hidden: bool = False
    _alone: dict[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> tuple[dict[str, Any], str]:
        """Where it is found. Engines put others in its place."""
        return (self._alone if self.is_hidden else self.block._parameters), self.name

    @property
    def parameter(self) -> nn.Parameter:
        kept, name = self.owner
        parameter: nn.Parameter = kept[name]
        return parameter

    @property
    def owners(self) -> Owners:
        """Where each part's module finds it."""
        return [
            (part.module._parameters if self.is_hidden else vars(part.module), part.name)
            for part in self.parts
        ]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each part's view of a tensor of the flat parameter's length."""
        pieces = flat.split([part.shape.numel() for part in self.parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]

    def running_views(self) -> list[Tensor]:
        """Each part's view of what stands for the flat parameter now, with what scripts ask of a hidden part: that it
        gets no gradient, or that hooks see its gradient."""
        flat = self.parameter
        accumulators: list[Accumulator] = []
        if (whole := accumulator_of(flat)) is None:
            views = self.views(flat)
        else:
            accumulators = [Accumulator(place, whole) for place in self.views(whole.place)]
            views = take_apart(flat, self.views(flat.detach()), accumulators)
        for index, part in enumerate(self.parts if self.is_hidden else ()):
            parameter = cast(nn.Parameter, part.parameter)
            if not parameter.requires_grad:
                views[index] = views[index].detach()
            elif parameter._backward_hooks and views[index].requires_grad:
                for hook in parameter._backward_hooks.values():
                    views[index].register_hook(hook)
        for view, accumulator in zip(views, accumulators, strict=False):
            if not view._backward_hooks:  # they see only what goes through autograd
                let_accumulate(view, accumulator)
        return views

    def take_places(self) -> None:
        """The block has the flat parameter in place of its parts, whose modules get tensors of the parts' shapes that
        hold nothing; most operators fail on them, where a block is read by mistake."""
        for part in self.parts:
            del part.module._parameters[part.name]
            vars(part.module)[part.name] = torch.empty(part.shape, dtype=self.parameter.dtype, device="meta")

    def give_places_back(self, parts: Sequence[nn.Parameter]) -> None:
        for part, parameter in zip(self.parts, parts, strict=True):
            del vars(part.module)[part.name]
            part.module.register_parameter(part.name, parameter)

    def hide(self) -> None:
        """The block has its parts, as before, in the memory of the flat parameter, and not this."""
        self._alone[self.name] = self.block._parameters.pop(self.name)
        self.is_hidden = True
        self.share_memory()
        self.give_places_back([cast(nn.Parameter, part.parameter) for part in self.parts])

    def share_memory(self) -> None:
        """The hidden parts lie where the flat parameter lies now."""
        parts = [cast(nn.Parameter, part.parameter) for part in self.parts]
        flat = self.parameter
        places = [flat.data_ptr() + part.begin * flat.element_size() for part in self.parts]
        if places == [part.data_ptr() for part in parts]:
            return  # in most steps, and views take longer
        for part, view in zip(parts, self.views(flat.detach()), strict=True):
            part.data = view

    def show(self) -> None:
        """The inverse of `hide`."""
        self.is_hidden = False
        self.block.register_parameter(self.name, self._alone.pop(self.name))
        self.take_places()


Blocks = Mapping[int, nn.Module]
"""By index."""


class FlatParameters:
    """The flat parameters of a model's blocks.

    Made once, of a model whose parameters lie whole on this rank, before an engine spreads or copies them.
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, groups: Sequence[dict[str, Any]], *, keeps_parts: bool = False
    ) -> None:
        """Puts flat parameters in the place of those of `blocks` that are in `groups`, an optimiser's that has no state
        yet: one for each block, group and dtype.

        keeps_parts: whether the parts are kept, for `hide`, and all stay in their groups' order, which DeepSpeed's own
            checkpoints follow; then only neighbours are put together.
        """
        paths = {id(module): path for path, module in model.named_modules()}
        self._of_block: dict[int, list[_Flat]] = {index: [] for index in blocks}
        self.is_unflattened = False
        self._orders = [(module, list(module._parameters)) for module in model.modules()]
        block_of = {
            id(parameter): index for index, block in blocks.items() for parameter in block.parameters()
        }
        of_modules = (  # a module may be held twice, too
            module._parameters.values() for _, module in model.named_modules(remove_duplicate=False)
        )
        # Engines refuse by name what is twice in groups.
        shared = _repeated(of_modules) | _repeated(group["params"] for group in groups)

        def key(parameter: nn.Parameter) -> tuple[int, torch.dtype] | None:
            index = block_of.get(id(parameter))
            is_alone = id(parameter) in shared or not parameter.requires_grad
            # Hooks that wait for a parameter's own gradient have no other place.
            is_alone = is_alone or bool(parameter._post_accumulate_grad_hooks)
            return None if is_alone or index is None else (index, parameter.dtype)

        for group in groups:
            parameters = list(group["params"])
            if not keeps_parts:
                # Flat ones first, because engines lay a group's parameters one after the other: behind the ten numbers
                # of a classifier's bias, products read weights at odd addresses, which takes twice the time.
                parameters.sort(key=lambda each: (key(each) is None, (key(each) or (0,))[0]))
            group["params"] = []
            for alike, run in groupby(parameters, key):
                if alike is None:
                    group["params"] += run
                else:
                    index = alike[0]
                    group["params"].append(
                        self._flatten(blocks[index], index, list(run), paths, keeps_parts=keeps_parts)
                    )

    def _flatten(
        self,
        block: nn.Module,
        index: int,
        parameters: list[nn.Parameter],
        paths: Mapping[int, str],
        *,
        keeps_parts: bool,
    ) -> nn.Parameter:
        place = {
            id(parameter): (module, name)
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        parts = []
        begins = accumulate((parameter.numel() for parameter in parameters), initial=0)
        for parameter, begin in zip(parameters, begins, strict=False):
            module, name = place[id(parameter)]
            kept = parameter if keeps_parts else None
            parts.append(Part(module, name, f"{paths[id(module)]}.{name}", parameter.shape, begin, kept))
        whole = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        number = len(self._of_block[index])
        flat = _Flat(block, f"flat_{number}", f"{paths[id(block)]}.flat_{number}", parts)
        self._of_block[index].append(flat)
        block.register_parameter(flat.name, whole)
        flat.take_places()
        return whole

    @contextmanager
    def placed(self, index: int) -> Iterator[None]:
        """Inside, the modules of block `index` find views of what the block holds now as their parameters."""
        flats = [] if self.is_unflattened else self._of_block[index]
        if not torch.is_grad_enabled():  # hidden parts have the values, or others that a script evaluates
            flats = [flat for flat in flats if not flat.is_hidden]
        owners = [owner for flat in flats for owner in flat.owners]
        with stand_ins(owners, [view for flat in flats for view in flat.running_views()]):
            yield

    def owners(self, index: int, owners: Owners) -> Owners:
        """Those of block `index`, with its flat parameters in place of their parts."""
        hidden = [flat for flat in self._of_block[index] if flat.is_hidden]
        parts = {(id(kept), name) for flat in hidden for kept, name in flat.owners}
        others = [(kept, name) for kept, name in owners if (id(kept), name) not in parts]
        return [*(flat.owner for flat in hidden), *others]

    @contextmanager
    def unflattened(self) -> Iterator[None]:
        """Inside, the model has the parameters that it had before, in the memory of the flat ones, and not these, and
        runs on them. Only where an engine leaves them whole."""
        if self.is_unflattened:
            yield
            return
        placed = {flat: flat.parameter for flat in self._all() if not flat.is_hidden}
        for flat, parameter in placed.items():
            del flat.block._parameters[flat.name]
            flat.give_places_back(
                [nn.Parameter(view, parameter.requires_grad) for view in flat.views(parameter.detach())]
            )
        self.is_unflattened = True
        try:
            yield
        finally:
            self.is_unflattened = False
            for flat, parameter in placed.items():
                flat.block.register_parameter(flat.name, parameter)
                flat.take_places()

    def hide(self) -> None:
        """From now on, outside of blocks' runs, the model has the parameters that it had before, in their order and in
        the memory of the flat ones, and not these; they get no gradients. Only where an engine leaves the flat ones
        whole and where they are."""
        for flat in self._all():
            flat.hide()
        for module, names in self._orders:
            for name in names:
                module._parameters[name] = module._parameters.pop(name)

    def share_memory(self) -> None:
        """Hidden parts lie where the flat parameters lie now: after an engine moved these, or a script those."""
        for flat in self._all():
            if flat.is_hidden:
                flat.share_memory()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model has the flat parameters, also where they are hidden."""
        hidden = [flat for flat in self._all() if flat.is_hidden]
        for flat in hidden:
            flat.show()
        try:
            yield
        finally:
            if hidden:
                self.hide()

    def parts_of(self, name: str) -> Sequence[Part]:
        """The parts of the flat parameter of this name in the model; none of any other parameter."""
        return next((flat.parts for flat in self._all() if flat.path == name), ())

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


def _repeated(groups: Iterable[Iterable[object]]) -> set[int]:
    """Identities of what is there more than once."""
    counts = Counter(id(each) for group in groups for each in group)
    return {identity for identity, count in counts.items() if count > 1}
