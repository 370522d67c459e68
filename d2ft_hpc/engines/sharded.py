"""The state of a model whose parameters are spread as DTensors, by FSDP2 or cut by head: portable, and by torch's DCP.

A DCP folder has each rank's slices. Its file `.metadata` is a pickle, which can run any code when it is read: it is
read here with only the classes that DCP writes. Only tensors are stored and loaded, which torch reads with
weights_only.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from d2ft_hpc.engines.portable import PortableState
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.files import atomic
from d2ft_hpc.files.untrusted import read_json
from d2ft_hpc.parallel.dtensor import DTensorExecutor

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LAYOUT = "layout.json"
"""Name of the file in a DCP folder that says in which order heads lie."""


def collect(model: nn.Module, optimizer: Optimizer, executor: PlanExecutor) -> PortableState:
    """The state between two steps on rank 0, empty on the others; all ranks call it together."""
    weights: Any = get_model_state_dict(model, options=_FULL)
    state = PortableState({name: _to_timm(executor, name, tensor) for name, tensor in weights.items()})
    of_optimizer: Any = get_optimizer_state_dict(model, optimizer, options=_FULL).get("state", {})
    for name, of_parameter in of_optimizer.items():
        for kind, value in of_parameter.items():
            if isinstance(value, Tensor) and value.dim():
                state.moments.setdefault(kind, {})[name] = _to_timm(executor, name, value)
            elif value is not None:
                state.numbers[kind] = float(value)
    return state


def whole_weights(model: nn.Module, executor: PlanExecutor) -> dict[str, Tensor]:
    """Parameters and buffers by timm's names, complete on every rank; all ranks call it together."""
    weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: _to_timm(executor, name, tensor) for name, tensor in weights.items()}


def restore(state: PortableState, model: nn.Module, optimizer: Optimizer, executor: PlanExecutor) -> None:
    """Loads `state`, which is complete on each rank. Raises CheckpointError if it is of another model."""
    state.check_fits({name: tensor.shape for name, tensor in model.state_dict().items()})
    weights: Any = {name: _from_timm(executor, name, tensor) for name, tensor in state.weights.items()}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    if not state.moments:
        return
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    of_parameters: Any = {
        name: {
            **{kind: torch.tensor(value) for kind, value in state.numbers.items()},
            **{kind: _from_timm(executor, name, of_kind[name]) for kind, of_kind in state.moments.items()},
        }
        for name in (named[id(p)] for group in optimizer.param_groups for p in group["params"])
    }
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": of_parameters, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )


def save_sharded(folder: Path, model: nn.Module, optimizer: Optimizer, executor: PlanExecutor) -> None:
    """Writes a DCP folder, each rank its slices; all ranks call it together."""
    save(_tensors(model, optimizer), checkpoint_id=folder)
    if dist.get_rank() == 0:
        atomic.write(folder / _LAYOUT, json.dumps(_layout(executor)))
    dist.barrier()


def load_sharded(folder: Path, model: nn.Module, optimizer: Optimizer, executor: PlanExecutor) -> None:
    """Loads what `save_sharded` wrote, for any number of ranks and any mesh; all ranks call it together.

    Raises CheckpointError where it is missing, of another model, or cut by head over other ranks: then go through
    the portable state.
    """
    try:
        saved = read_json(folder / _LAYOUT)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no sharded checkpoint ({error})") from None
    if saved != _layout(executor):
        raise CheckpointError(
            f"{folder}: heads lie in another order, because tensor-parallel ranks held others: load it with the "
            f"ranks that saved it, and go on from the portable state"
        )
    state = _tensors(model, optimizer)
    reader = _CheckedReader(folder)
    try:
        reader.read_metadata()  # before DCP reads it, since some releases of DCP report success for faults here
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    try:
        load(state, storage_reader=reader)
    except CheckpointException as error:
        reasons = sorted(
            str(failure[0]) for failure in error.failures.values()
        )  # with its traceback, by rank
        raise CheckpointError(f"{folder}: {reasons[0]}") from None
    options = StateDictOptions(strict=True)
    set_model_state_dict(model, state["model"], options=options)
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(
        model, optimizer, {"state": state["optimizer"], "param_groups": groups}, options=options
    )


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """By what and by name, nothing but tensors."""
    of_optimizer: Any = get_optimizer_state_dict(model, optimizer)["state"]
    return {
        "model": get_model_state_dict(model),
        "optimizer": {
            name: {kind: value for kind, value in of_parameter.items() if isinstance(value, Tensor)}
            for name, of_parameter in of_optimizer.items()
        },
    }


class _CheckedReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _MetadataUnpickler(file).load()


class _MetadataUnpickler(pickle.Unpickler):
    """Allows only the classes that DCP's metadata of tensors consists of."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _METADATA.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not known:
            raise pickle.UnpicklingError(
                f".metadata names {module}.{name}, which no checkpoint of tensors needs"
            )
        return super().find_class(module, name)


_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
}


def _layout(executor: PlanExecutor) -> dict[str, Any]:
    return {"owner": executor.owner.tolist() if isinstance(executor, DTensorExecutor) else None}


def _to_timm(executor: PlanExecutor, name: str, tensor: Tensor) -> Tensor:
    return executor.to_timm(name, tensor) if isinstance(executor, DTensorExecutor) else tensor


def _from_timm(executor: PlanExecutor, name: str, tensor: Tensor) -> Tensor:
    return executor.from_timm(name, tensor) if isinstance(executor, DTensorExecutor) else tensor
