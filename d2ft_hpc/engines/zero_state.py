"""A DeepSpeed engine's state as full tensors in timm's names, and back, for every ZeRO stage.

ZeRO keeps float32 weights and the optimiser's moments in flat partitions of its own order. Both have one layout, and
DeepSpeed offers to read and write a parameter of the weights; so the moments take the weights' place for a moment and
are read or written the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2ft_hpc.engines import deepspeed_private as private
from d2ft_hpc.engines.portable import PortableState, collect_plain, counters, restore_plain


def collect(model: nn.Module, engine: Any) -> PortableState:
    """The state between two steps, complete on rank 0 alone; all ranks call it together."""
    flats = private.flat_master_weights(engine)
    if flats is None:
        masters = private.unpartitioned_master_weights(model, engine)
        return collect_plain(model, engine.basic_optimizer, masters)
    state = PortableState(
        {name: buffer.detach().cpu().clone() for name, buffer in _saved_buffers(model)},
        numbers=private.loss_scaler_numbers(engine),
    )
    for name, parameter in model.named_parameters():
        state.weights[name] = full_precision(parameter).cpu().clone()
    states = [engine.basic_optimizer.state.get(flat, {}) for flat in flats]
    for kind, value in states[0].items():
        if not isinstance(value, Tensor) or not value.numel() == flats[0].numel() > 1:  # a counter
            continue
        with _in_place_of_weights(flats):
            for flat, of_flat in zip(flats, states, strict=True):
                flat.data.copy_(of_flat[kind])
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            state.moments[kind] = {name: full_precision(p).cpu().clone() for name, p in trained}
    for key, value in [*states[0].items(), *engine.basic_optimizer.param_groups[0].items()]:
        if key == "step" and value is not None:  # some optimisers count in their groups
            state.numbers[key] = float(value)
    return state


def restore(state: PortableState, model: nn.Module, engine: Any) -> None:
    """Loads `state`; all ranks call it together. Raises CheckpointError if it is of another model."""
    shapes = {
        name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in model.named_parameters()
    }
    state.check_fits({**shapes, **{name: buffer.shape for name, buffer in _saved_buffers(model)}})
    flats = private.flat_master_weights(engine)
    if flats is None:
        masters = private.unpartitioned_master_weights(model, engine)
        restore_plain(state, model, engine.basic_optimizer, masters)
        return
    optimizer = engine.basic_optimizer
    of_flats: list[dict[str, Any]] = [{} for _ in flats]
    for kind, by_name in state.moments.items():
        with _in_place_of_weights(flats):
            for flat in flats:
                flat.data.zero_()
            _write_all(model, by_name)
            for flat, of_flat in zip(flats, of_flats, strict=True):
                of_flat[kind] = flat.detach().clone()
    for flat, of_flat in zip(flats, of_flats, strict=True):
        if of_flat:
            optimizer.state[flat] = {**counters(state, optimizer, flat), **of_flat}
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = int(state.numbers["step"])
    _write_all(model, state.weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with private.whole(parameter, written=True) as full:
                full.copy_(state.weights[name])
        for name, buffer in _saved_buffers(model):
            buffer.copy_(state.weights[name])
    private.restore_loss_scaler(engine, state.numbers)


def _saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = {name for name, _ in model.named_parameters()}
    return [
        (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters
    ]


@contextmanager
def _in_place_of_weights(flats: list[Tensor]) -> Iterator[None]:
    """Keeps the master weights aside while their partitions hold something else."""
    weights = [flat.detach().clone() for flat in flats]
    try:
        yield
    finally:
        for flat, own in zip(flats, weights, strict=True):
            flat.data.copy_(own)


def _write_all(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in values:
            private.write_master_weight(parameter, values[name].float())


def full_precision(parameter: nn.Parameter) -> Tensor:
    """The optimiser's fp32 weights if it keeps any, gathered where ZeRO spreads them over replicas."""
    from deepspeed.utils import safe_get_full_fp32_param

    full: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is not None:
        return full.detach()
    with private.whole(parameter) as data:
        return data.detach().to(torch.float32, copy=True)
