"""What models of the library transformers have in common: q, k, v apart, an MLP, blocks that checkpoint themselves.

transformers is not imported: a model that is one of its has brought it along.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2ft_hpc.errors import PlanError, UnsupportedModelError
from d2ft_hpc.families.family import BlockFamily, Branch, Drops
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import into_heads, out_of_heads
from d2ft_hpc.families.low_rank import axes_of, unfit_layers

_MODELS = "transformers.models."
ATTENTIONS = ("sdpa", "eager")
"""The implementations of attention in transformers whose results under plans are tested."""


class TransformersFamily(BlockFamily):
    """A subnet is a group of query heads with its key and value head, and its slice of the MLP."""

    classes: tuple[str, ...]
    """The models' classes, with their modules in transformers.models."""
    norms: tuple[str, str]
    """Names in a block of the norms before attention and MLP."""
    is_composed = False
    refuses_parts = "transformers' models are run whole, parts of them by ranks are not made"

    def has(self, model: nn.Module) -> bool:
        if "transformers" not in sys.modules:
            return False
        # A subclass's too, such as FSDP2 makes.
        return any(
            each.__module__.startswith(_MODELS)
            and f"{each.__module__.removeprefix(_MODELS)}.{each.__qualname__}" in self.classes
            for each in type(model).__mro__
        )

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        try:
            return super().blocks(model)
        except AttributeError:
            raise UnsupportedModelError(
                f"this {type(model).__name__} has no {self.blocks_path}: update transformers to 5.24 or newer"
            ) from None

    def misfits(self, block: nn.Module) -> list[str]:
        name = type(block).__name__
        if not type(block).forward.__module__.startswith(_MODELS):
            return [f"is a {name} with a forward that is not transformers'"]
        if inspect.signature(type(block).forward).return_annotation not in (Tensor, "torch.Tensor"):
            return [f"is a {name} that gives more than a tensor: update transformers to 5.24 or newer"]
        attn: Any = block.get_submodule(self.attention)
        if not hasattr(attn, "q_proj"):
            return [f"has no {self.attention}.q_proj: update transformers to 5.24 or newer"]
        reasons = []
        if attn.config._attn_implementation not in ATTENTIONS:
            reasons.append(_other_attention(attn))
        return reasons + unfit_layers(block, self.layers(block))

    def around(self, model: Any, whole: nn.Module) -> Any:
        """transformers' own model with a head, such as a `...ForImageClassification`."""
        outer = (
            each
            for each in whole.modules()
            if getattr(each, "main_input_name", None) == model.main_input_name and model in each.children()
        )
        return next(outer, model)

    def width(self, model: Any) -> int:
        return int(model.config.hidden_size)

    # ---- activation checkpointing, which is each block's own affair

    def recomputes(self, model: Any) -> bool:
        return any(block.gradient_checkpointing for block in self.blocks(model))

    not_reentrant = 'call model.activation_checkpointing_enable({"use_reentrant": False})'

    def recomputes_reentrantly(self, model: Any) -> bool:
        functions = (b._gradient_checkpointing_func for b in self.blocks(model) if b.gradient_checkpointing)
        return any(getattr(each, "keywords", {}).get("use_reentrant", False) for each in functions)

    def recompute(self, model: Any) -> None:
        model.activation_checkpointing_enable({"use_reentrant": False})

    @contextmanager
    def not_recomputing(self, model: Any) -> Iterator[None]:
        recomputing: list[Any] = [block for block in self.blocks(model) if block.gradient_checkpointing]
        for block in recomputing:
            block.gradient_checkpointing = False
        try:
            yield
        finally:
            for block in recomputing:
                block.gradient_checkpointing = True

    def run(self, block: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if block.gradient_checkpointing and torch.is_grad_enabled():
            result: Tensor = block._gradient_checkpointing_func(forward, x)
            return result
        return forward(x)

    # ---- a block

    def num_heads(self, block: Any) -> int:
        attn = block.get_submodule(self.attention)
        return int(attn.k_proj.out_features // attn.head_dim)

    def layers(self, block: Any) -> Mapping[str, Sequence[str]]:
        def those(path: str, *names: str) -> tuple[str, ...]:
            within = block.get_submodule(path)._modules
            return tuple(f"{path}.{name}" for name in names if name in within)

        return {
            "qkv": those(self.attention, "q_proj", "k_proj", "v_proj"),
            "proj": those(self.attention, "o_proj", "out_proj"),
            "fc1": those("mlp", "gate_proj", "up_proj", "fc1"),
            "fc2": those("mlp", "down_proj", "fc2"),
        }

    def head_axes(self, block: Any) -> dict[str, HeadAxis]:
        layers, heads = self.layers(block), self.num_heads(block)
        own: dict[str, HeadAxis] = {}
        for name in (*layers["qkv"], *layers["fc1"]):
            layer = block.get_submodule(name)
            after = (layer.in_features,)
            own[f"{name}.weight"] = HeadAxis.of_units((), heads, layer.out_features, after, splits_rows=True)
            own[f"{name}.bias"] = HeadAxis.of_units((), heads, layer.out_features, splits_rows=True)
        for name in (*layers["proj"], *layers["fc2"]):
            layer = block.get_submodule(name)
            before = (layer.out_features,)
            own[f"{name}.weight"] = HeadAxis.of_units(before, heads, layer.in_features, splits_rows=False)
        return axes_of(block, own, layers)

    def branches(
        self,
        block: Any,
        axes: Mapping[str, HeadAxis],
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Sequence[Branch]:
        attn, mlp, layers = block.get_submodule(self.attention), block.mlp, self.layers(block)
        (proj,), (contract,) = layers["proj"], layers["fc2"]

        def owned(name: str, normed: Tensor, heads: Tensor) -> Tensor:
            return into_heads(block.get_submodule(name), name, axes, normed, heads)

        def mix(normed: Tensor, heads: Tensor) -> Tensor:
            query, key, value = (
                owned(name, normed, heads).unflatten(-1, (-1, attn.head_dim)) for name in layers["qkv"]
            )
            if hasattr(attn, "q_norm"):
                query, key = attn.q_norm(query), attn.k_norm(key)
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            if position_embeddings is not None:
                query, key = _library_of(attn).apply_rotary_pos_emb(query, key, *position_embeddings)
            return _attend(attn, query, key, value, attention_mask, **self.afresh(kwargs)).flatten(2)

        def activate(normed: Tensor, heads: Tensor) -> Tensor:
            act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
            first, *second = (owned(name, normed, heads) for name in layers["fc1"])
            hidden: Tensor = act(first)
            return hidden * second[0] if second else hidden

        def branch(index: int, inner: Callable[[Tensor, Tensor], Tensor], out: str) -> Branch:
            layer = block.get_submodule(out)
            return Branch(
                block.get_submodule(self.norms[index]),
                inner,
                partial(out_of_heads, layer, out, axes),
                layer.bias,
                partial(self.end, block, index),
            )

        return branch(0, mix, proj), branch(1, activate, contract)

    def end(self, block: Any, index: int, branch: Tensor) -> Tensor:
        """What a block does to the result of branch `index` before it adds it."""
        return branch

    def require_skippable(self, block: Any, kwargs: Mapping[str, Any]) -> None:
        attn = block.get_submodule(self.attention)
        if attn.config._attn_implementation not in ATTENTIONS:
            raise PlanError(f"the model {_other_attention(attn)}")
        if kwargs.get("output_attentions", getattr(attn.config, "output_attentions", False)):
            raise PlanError(
                "output_attentions=True in training: heads that a plan skips have no attentions; ask for them in "
                "evaluation mode (model.eval())"
            )
        cache = _cache_of(kwargs)
        if cache is not None and cache.get_seq_length(attn.layer_idx) > 0:
            raise PlanError(
                "the model trains on text that goes on from a cache, which heads that a plan skips do not keep: give "
                "it whole, without past_key_values"
            )

    def afresh(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in kwargs.items() if name not in _CACHES}

    def drops(self, block: Any) -> Drops:
        return Drops({}, (), ())


_CACHES = ("cache", "past_key_values")
"""Names of arguments that keep keys and values for generation."""


def _cache_of(kwargs: Mapping[str, Any]) -> Any:
    return next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)


def _library_of(module: nn.Module) -> Any:
    """The file of transformers that the module's class is from."""
    return sys.modules[type(module).__module__]


def _other_attention(attn: Any) -> str:
    return (
        f"computes attention by {attn.config._attn_implementation!r}: call model.set_attn_implementation('sdpa'), or "
        f"give attn_implementation='sdpa' to from_pretrained"
    )


def _attend(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """The attention of some heads of module `attn`, computed by transformers itself: [sample, token, head, channel].

    query, key, value: [sample, head, token, channel]; mask: for all heads alike, and kwargs, as the block got them.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        raise PlanError("an attention mask that differs between heads is not supported under a plan")
    library = _library_of(attn)
    name = attn.config._attn_implementation
    attend = library.eager_attention_forward if name == "eager" else library.ALL_ATTENTION_FUNCTIONS[name]
    rate = attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout
    if hasattr(attn, "sliding_window"):
        kwargs["sliding_window"] = attn.sliding_window
    mixed: Tensor = attend(
        attn,
        query,
        key,
        value,
        mask,
        dropout=rate if attn.training else 0.0,
        scaling=attn.scaling if hasattr(attn, "scaling") else attn.scale,
        **kwargs,
    )[0]
    return mixed
