"""A training state that does not depend on how an engine spreads it: full tensors under timm's parameter names.

Every engine writes and reads it, so that a run goes on under another ZeRO stage, or without DeepSpeed. On disk it is
two safetensors files: `model.safetensors`, which plain timm loads strictly, and `optimizer.safetensors`. An engine
that holds part of the parameters on each rank collects its own part under timm's names and merges the parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from d2ft_hpc.engines.engine import StateWriter
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.execution.flat_parameters import FlatParameters
from d2ft_hpc.files import atomic
from d2ft_hpc.files.untrusted import RefusedError, parse_json

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass
class PortableState:
    weights: dict[str, Tensor]
    """Every parameter and buffer of the model by timm's name; trained ones in float32, as the optimiser keeps them."""
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By the optimiser's name for it ("exp_avg", "momentum_buffer"), then by parameter: float32, parameter's shape."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The optimiser's counters ("step"), the same for all parameters, and a loss scaler's."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """The numbers in the learning-rate schedule's state_dict."""

    def write(self, folder: Path, write: StateWriter) -> None:
        """Hands both files' contents to `write`: {"tensors": ..., "metadata": ...}, as `write_file` takes them."""
        named = {f"{kind}/{name}": t for kind, of_kind in self.moments.items() for name, t in of_kind.items()}
        about = {"numbers": json.dumps(self.numbers), "schedule": json.dumps(self.schedule)}
        write({"tensors": self.weights, "metadata": {}}, folder / MODEL)
        write({"tensors": named, "metadata": about}, folder / OPTIMIZER)

    @classmethod
    def read(cls, folder: Path) -> PortableState:
        """Raises CheckpointError where the files are missing or damaged."""
        try:
            weights, _ = _read(folder / MODEL)
            named, about = _read(folder / OPTIMIZER)
            state = cls(weights, {}, parse_json(about["numbers"]), parse_json(about["schedule"]))
            for path, tensor in named.items():
                kind, _, name = path.partition("/")
                if name not in weights or tensor.shape != weights[name].shape:
                    raise RefusedError(f"{path!r} in {OPTIMIZER} belongs to no weight of its shape")
                state.moments.setdefault(kind, {})[name] = tensor
            for number in state.numbers.values():
                if type(number) not in (int, float):
                    raise RefusedError(f"{number!r} in {OPTIMIZER} is no number")
            if not _is_plain(list(state.schedule.values()) or [0]):
                raise RefusedError(f"the schedule in {OPTIMIZER} is not of numbers")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{folder}: no readable training state ({error})") from None
        return state

    def with_parts(self, flat: FlatParameters | None) -> PortableState:
        """What an engine with flat parameters has collected, under timm's names."""
        return self if flat is None else self._translated(flat.split)

    def with_flats(self, flat: FlatParameters | None) -> PortableState:
        """The inverse. Raises CheckpointError where the state is of another model."""
        if flat is None:
            return self
        flat.check_parts(self.weights)
        return self._translated(flat.join)

    def _translated(self, by: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> PortableState:
        moments = {kind: by(of_kind) for kind, of_kind in self.moments.items()}
        return replace(self, weights=by(self.weights), moments=moments)

    def check_fits(self, model_shapes: Mapping[str, torch.Size]) -> None:
        """Raises CheckpointError where the weights are not those of a model with these names and shapes."""
        own = {name: tensor.shape for name, tensor in self.weights.items()}
        differing = sorted(
            name for name in own.keys() | model_shapes.keys() if own.get(name) != model_shapes.get(name)
        )
        if differing:
            raise CheckpointError(
                f"the checkpoint is of another model: {len(differing)} weights differ in name or shape, "
                f"first {differing[0]!r}"
            )


def file_bytes(content: Mapping[str, Any]) -> bytes:
    """A safetensors file of this content, as a StateWriter takes it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content["tensors"].items()}
    written: bytes = serialize(tensors, metadata=dict(content["metadata"]))
    return written


def write_file(content: Mapping[str, Any], path: Path) -> None:
    """A StateWriter that writes immediately. Raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, file_bytes(content))


def collect_plain(
    model: nn.Module, optimizer: Optimizer, masters: Mapping[str, Tensor] | None = None
) -> PortableState:
    """The state of an optimiser that keeps a state for each trained parameter. masters: tensors that the optimiser
    updates in place of parameters, by the parameters' names; None: it updates the parameters.
    """
    masters = dict(model.named_parameters()) if masters is None else masters
    state = PortableState(
        {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    )
    for name, master in masters.items():
        state.weights[name] = master.detach().cpu().clone()
        for kind, value in optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor) and value.shape == master.shape:
                state.moments.setdefault(kind, {})[name] = value.detach().cpu().clone()
            elif value is not None:
                state.numbers[kind] = float(value)
    return state


def restore_plain(
    state: PortableState, model: nn.Module, optimizer: Optimizer, masters: Mapping[str, Tensor] | None = None
) -> None:
    """Puts `state` into `model` and its optimiser; `masters` as in `collect_plain`."""
    model.load_state_dict(state.weights, strict=True)
    masters = dict(model.named_parameters()) if masters is None else masters
    for name, master in masters.items():
        master.data.copy_(state.weights[name])
        own = {kind: of_kind[name] for kind, of_kind in state.moments.items() if name in of_kind}
        if own:
            optimizer.state[master] = {
                **counters(state, optimizer, master),
                **{kind: tensor.to(master.device, copy=True) for kind, tensor in own.items()},
            }


def counters(state: PortableState, optimizer: Optimizer, stepped: Tensor) -> dict[str, Any]:
    """The step count in the form in which `optimizer` keeps it beside its moments."""
    if "step" not in state.numbers or "step" in optimizer.param_groups[0]:
        return {}
    if type(optimizer).__module__.startswith("deepspeed"):
        return {"step": int(state.numbers["step"])}
    on_device = any(optimizer.param_groups[0].get(key) for key in ("fused", "capturable"))
    return {"step": torch.tensor(state.numbers["step"], device=stepped.device if on_device else "cpu")}


def schedule_numbers(schedule: LRScheduler | None) -> dict[str, Any]:
    """The plain numbers of a schedule's state; its functions come from the configuration. Empty without a
    schedule."""
    if schedule is None:
        return {}
    return {key: value for key, value in schedule.state_dict().items() if _is_plain(value)}


def restore_schedule(schedule: LRScheduler, numbers: Mapping[str, Any]) -> None:
    """Lets the schedule go on after the saved number of steps, but with its own rates: the saved ones belong to the
    run's length at that time, and to the parameter groups of the rank that saved them."""
    assert isinstance(schedule, LambdaLR)
    counts = {key: numbers[key] for key in ("last_epoch", "_step_count")}
    schedule.load_state_dict({**schedule.state_dict(), **counts})
    schedule._last_lr = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        names: Iterable[str] = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
