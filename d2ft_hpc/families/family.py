"""What a family of models says of itself, so that plans can run on it; README.md says how the parts fit together."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2ft_hpc.families.head_axis import HeadAxis

NO_TARGET = -100
"""Label of a token that is not to be learnt, as torch and transformers have it."""


class Branch(NamedTuple):
    """A residual branch of a block: x + end(sum over heads of out(inner(norm(x))) + bias).

    x: [sample, token, channel]. norm keeps its shape. inner: from the normed x and heads, int64 [n] in rising order,
    to what these compute, [sample, token, their channels]. out: from that, the heads and a bias or None, to the sum
    of what they give, [sample, token, channel]. end: from the sum over all heads to what is added to x; keeps its
    shape. across: what lies between inner and out and needs all heads that run, such as a norm over all their
    channels. Of what inner gave, a part for FULL heads and one for FORWARD_ONLY ones, or one of them, and these
    parts' heads; the same parts again. Ranks that share a block cannot run it. None: there is nothing.
    """

    norm: Callable[[Tensor], Tensor]
    inner: Callable[[Tensor, Tensor], Tensor]
    out: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    bias: Tensor | None
    end: Callable[[Tensor], Tensor]
    across: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] | None = None


class Drops(NamedTuple):
    """The modules of a block that draw random numbers in training.

    by_head: for single heads, by names in the block. by_token: for single tokens, after the sum over heads. by_sample:
    for single samples.
    """

    by_head: Mapping[str, nn.Module]
    by_token: Sequence[nn.Module]
    by_sample: Sequence[nn.Module]

    @property
    def rates_by_sample(self) -> tuple[float, ...]:
        return tuple(rate_of(module) for module in self.by_sample)


def has_own(module: nn.Module, method: str) -> bool:
    """Whether the module, or a class that is not of timm or transformers, has a method in place of the library's."""
    library = getattr(type(module), method).__module__.partition(".")[0]
    return method in vars(module) or library not in ("timm", "transformers")


def rate_of(drop: nn.Module) -> float:
    """The rate at which a module drops what it gets; 0 for a module without one, such as an identity."""
    return float(getattr(drop, "p", getattr(drop, "drop_prob", None)) or 0.0)


@dataclass(frozen=True)
class KernelParts:
    """The modules of a block that our GPU kernels can run (`execution/fused.py`):

        x = x + gamma1 * proj(attend(qkv(norm1(x)))),   y = x + gamma2 * fc2(gelu(fc1(norm2(x))))

    with plain linear layers, rows of qkv in the order q, k, v, layer norms, and equal shares of hidden units.

    attend: of q, k, v, each [sample, head, token, channel], their heads, int64 [n], and of what the block's forward
    takes beside x. is_plain: it is torch's attention and nothing else. scale1, scale2: give gamma1, gamma2 or None, as
    the block has them at the time.
    """

    norm1: nn.LayerNorm
    qkv: nn.Linear
    attend: Callable[..., Tensor]
    is_plain: bool
    proj: nn.Linear
    scale1: Callable[[], Tensor | None]
    norm2: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    scale2: Callable[[], Tensor | None]


class BlockFamily(ABC):
    """Models whose blocks are cut by head in the same way. A family keeps no state of any model.

    Blocks without `misfits` in one model have to be alike. Methods that take a block take it whole, or what
    `parallel.head_split` has left of it.
    """

    supported: str
    """What fits, in words, for messages."""

    blocks_path: str
    """Where the blocks are, one after the other."""

    names_below: tuple[str, ...]
    """First parts of the names of parameters below all blocks."""

    names_sized: tuple[str, ...] = ()
    """Names of a model's modules that know for which size of images it was made."""

    attention: str
    """Name of a block's attention."""

    refuses_parts: str | None = None
    """The reason why ranks cannot hold parts of a model; None if they can."""

    is_composed: bool = True
    """A model's forward of images alone is `above(blocks(below(images)))`. False: `below` and `above` are not
    known."""

    takes_images: bool = True
    """False: models read text, which is never scaled. A sample is then a sequence, and the models have no image
    size."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.blocks_path).children())

    # ---- which models fit

    def composes(self, model: Any) -> bool:
        """Whether this model's forward is `above(blocks(below(images)))`, as in its library: not where a class derived
        from the library's, or the model itself, has another one."""
        return self.is_composed and not any(has_own(model, name) for name in ("forward", "forward_features"))

    @abstractmethod
    def has(self, model: nn.Module) -> bool:
        """Whether it is this family that knows the model's class."""

    @abstractmethod
    def misfits(self, block: nn.Module) -> list[str]:
        """Why a block cannot be cut by head, as phrases whose subject is the block; empty if it can."""

    # ---- what a model reads

    def sample_shape(self, model: Any) -> tuple[int, ...] | None:
        """Shape of one sample that the model was made for; None if it was made for no size."""
        return self.image_shape(model)

    def blank(self, model: Any, shape: tuple[int, ...]) -> Tensor:
        """A sample of this shape as the model takes it, [1, *shape], on its device, of zeros."""
        weight = next(model.parameters())
        return torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)

    def size_of(self, samples: Tensor, shape: tuple[int, ...]) -> float:
        """Tokens of each of these samples, in units of those of a sample of this shape, where plans do not say how
        many: images count by their tokens, whole or in patches. 1 for anything else."""
        return math.prod(samples.shape[1:]) / math.prod(shape) if samples.dim() > 2 else 1.0

    def excerpt(self, text: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Of texts, a quarter of each one's tokens, as the model takes them by name, and the targets of their logits,
        int64 [sample, token], NO_TARGET where a token has none; for models that read text.

        text: `labels`, int64 [sample, token], and what the model takes, each [sample, token, ...].
        """
        raise NotImplementedError

    def around(self, model: Any, whole: nn.Module) -> Any:
        """The largest module within the user's `whole` model that has the model inside and takes the same input, such
        as a library's model with a head; the model itself where there is none."""
        return model

    # ---- what lies around the blocks

    def is_below(self, name: str) -> bool:
        """Whether a parameter of this name, outside the blocks, lies below all of them; else above."""
        return name.split(".")[0] in self.names_below

    def goes_beside(self, name: str) -> bool:
        """Whether a parameter of this name, below the blocks, gets gradients from each block that runs, and not only
        through x."""
        return False

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        """The input of the first block, and what `arguments` turns into the other arguments of blocks."""
        raise NotImplementedError

    def arguments(self, beside: Any, index: int) -> Mapping[str, Any]:
        """The arguments of block `index` beside x, by keyword. beside: from `below`."""
        return {}

    def above(self, model: Any, x: Tensor) -> Tensor:
        """Logits, of what the last block gives."""
        raise NotImplementedError

    def tokens(self, model: Any, height: int, width: int) -> int:
        """Tokens between the blocks of an image of this size in pixels."""
        raise NotImplementedError

    def tokens_between(self, model: Any) -> int | None:
        """Tokens of every sample between the blocks; None if their number varies."""
        return None

    @abstractmethod
    def width(self, model: Any) -> int:
        """Channels between the blocks."""

    @abstractmethod
    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        """(channel, height, width) that the model was made for; None if it was made for no size."""

    def numbers_between(self, model: Any) -> int:
        """Numbers that a sample has between the blocks, of images of the size that the model was made for."""
        shape = self.image_shape(model)
        assert shape is not None
        return self.tokens(model, *shape[1:]) * self.width(model)

    @abstractmethod
    def takes_other_sizes(self, model: Any) -> bool:
        """Whether the model itself takes images of other sizes."""

    def patch_size(self, model: Any) -> tuple[int, int]:
        """Height and width of the pixels that become one token."""
        raise NotImplementedError

    def of_any_size(self, model: Any) -> Any:
        """The same model, or part of one, its modules and parameters shared, that takes images of any size."""
        twin = copy.copy(model)
        twin._modules = dict(model._modules)
        for name in self.names_sized:
            if name in twin._modules:  # parts of a model may lack it
                twin._modules[name] = copy.copy(model._modules[name])
        self.take_any_size(twin)
        return twin

    @abstractmethod
    def take_any_size(self, model: Any) -> None:
        """Makes the model itself what `of_any_size` makes of it, for good."""

    def let_graphs_capture(self, model: Any) -> None:
        """Makes what the model computes outside its blocks fit for a CUDA graph, which can neither copy from the
        processor nor draw there. Raises ConfigError where it cannot be."""
        return

    @abstractmethod
    def embedding(self, model: Any) -> nn.Module | None:
        """The module that gets a model's images, first or as `pixel_values`; None where there is none."""

    @contextmanager
    def taking_any_size(self, model: Any) -> Iterator[None]:
        """Inside, the model itself takes images of any size, as `of_any_size` makes it; for models whose hooks belong
        to them, such as FSDP2's."""
        sized = [each for name in self.names_sized if (each := model._modules.get(name)) is not None]
        modules = [model, *(module for each in sized for module in each.modules())]
        before = [(vars(module), dict(vars(module))) for module in modules]
        self.take_any_size(model)
        changed = [
            (own, was, name) for own, was in before for name in own if own[name] is not was.get(name, before)
        ]
        try:
            yield
        finally:
            for own, was, name in changed:
                del own[name]
                if name in was:
                    own[name] = was[name]

    @abstractmethod
    def recomputes(self, model: Any) -> bool:
        """Whether the model's blocks run again in the backward (activation checkpointing)."""

    @abstractmethod
    def recomputes_reentrantly(self, model: Any) -> bool:
        """Whether that is in torch's reentrant way, which loses the gradients of a block whose input takes none."""

    not_reentrant: str
    """What to do against it, in words."""

    @abstractmethod
    def recompute(self, model: Any) -> None:
        """Lets the model's blocks run again in the backward, not reentrantly.

        Raises UnsupportedModelError where it cannot.
        """

    @abstractmethod
    def not_recomputing(self, model: Any) -> AbstractContextManager[None]:
        """Inside, the model's blocks run once."""

    # ---- a block

    def run(self, block: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`forward(x)` of a block that skips heads; it runs again in the backward if the block checkpoints itself."""
        return forward(x)

    def require_skippable(self, block: Any, kwargs: Mapping[str, Any]) -> None:
        """Raises PlanError where the block is asked for outputs that skipped heads cannot give. kwargs: of its
        forward."""
        return

    def afresh(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments for running a block again by itself, after its forward got these."""
        return kwargs

    @abstractmethod
    def num_heads(self, block: Any) -> int:
        """Subnets of a block."""

    @abstractmethod
    def layers(self, block: Any) -> Mapping[str, Sequence[str]]:
        """The linear layers that are cut by head, by their role (qkv, proj, fc1, fc2): names in the block."""

    def biases(self, block: Any, layer: str) -> Mapping[str, slice]:
        """The parameters that are added to what a layer gives, by their names in the block, and to which channels."""
        return {f"{layer}.bias": slice(None)}

    def calling(self, block: Any) -> AbstractContextManager[None] | None:
        """Inside, the block calls its layers as modules, so that hooks on them see inputs and outputs, and computes
        the same; None if it always does so."""
        return None

    @abstractmethod
    def head_axes(self, block: Any) -> dict[str, HeadAxis]:
        """How each parameter that heads own splits by head, by its name in the block; LoRA's included."""

    def cast_buffers(self, block: Any, dtype: torch.dtype) -> None:
        """Gives the type of the block's parameters to buffers that are joined to them."""
        return None

    def norm_axes(self, block: Any) -> dict[str, HeadAxis]:
        """How the parameters of norms over the channels of all heads split by head. Heads compute with their part of
        these, and none owns them."""
        return {}

    def used_by_head(self, name: str) -> bool:
        """Whether each head by itself computes with the parameter of this name in the block, though no head owns
        it."""
        part, _, path = name.rpartition(".")[0].partition(".")
        return part in (self.attention, "mlp") and ("norm" in path or "lora_" in path)

    @abstractmethod
    def branches(
        self, block: Any, axes: Mapping[str, HeadAxis], *args: Any, **kwargs: Any
    ) -> Sequence[Branch]:
        """What the block adds to its input, one after the other.

        axes: of the block's parameters as they are now, with those of norms across heads (`norm_axes`), if these run.
        args, kwargs: what the block's forward takes beside x.
        """

    @abstractmethod
    def drops(self, block: Any) -> Drops: ...

    def set_heads(self, block: Any, heads: int) -> None:
        """Tells the modules of a block that was cut how many heads are left."""
        raise NotImplementedError

    def kernel_parts(self, block: Any) -> KernelParts | None:
        """The block's parts for our kernels; None if these cannot run it in training."""
        return None


class AnySize(BlockFamily):
    """Families whose models take images of any size as they are, or take no images."""

    def takes_other_sizes(self, model: Any) -> bool:
        return True

    def of_any_size(self, model: Any) -> Any:
        return model

    def take_any_size(self, model: Any) -> None:
        return
