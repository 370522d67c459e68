"""`d2ft_hpc.initialize`: what `deepspeed.initialize` takes and gives back, with an engine that follows plans."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.engines.zero import ZeroRules
from d2ft_hpc.errors import ConfigError, LaunchError, UnsupportedModelError
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.launch import Control, connect, detect
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.user_loop.follower import PlanFollower
from d2ft_hpc.user_loop.section import SECTION, split

_END_SECONDS = 25.0
"""How long a rank waits for the others when its script ends."""


def initialize(
    args: Any = None,
    model: VisionTransformer | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Mapping[str, Any] | None = None,
    config_params: str | Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """A DeepSpeed engine that trains `model` under skip plans; arguments and returns are `deepspeed.initialize`'s.

    The configuration's "d2ft" section (`d2ft_hpc.user_loop.section.D2ftSection`) says how to plan. The loop stays as
    it is: `engine(images)`, `engine.backward(loss)`, `engine.step()`, once for each micro-batch. The first
    `probe_batches` batches run dense and give the scores. `engine.d2ft` is the `PlanFollower`. Ranks meet as the
    launcher says (mpirun, srun, torchrun, deepspeed); only then are `distributed_port` and `dist_init_required` of no
    use and ignored.

    Raises ConfigError, PlanError or UnsupportedModelError before any step where the model, the configuration or the
    plan cannot be run exactly.
    """
    given = config if config is not None else config_params
    given = given if given is not None else getattr(args, "deepspeed_config", None)
    if given is None:
        raise ConfigError(
            "initialize needs DeepSpeed's configuration: config=DICT_OR_PATH, or --deepspeed_config"
        )
    if config is not None and getattr(args, "deepspeed_config", None) is not None:
        raise ConfigError("DeepSpeed's configuration is given twice: as config= and as --deepspeed_config")
    settings, section = split(given)
    if mpu is not None:
        raise ConfigError(
            "mpu=: model parallelism in a loop of your own is not supported; use d2ft-hpc train"
        )
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}, not a timm VisionTransformer: make it with timm.create_model"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            "model was made inside deepspeed.zero.Init: make it outside, ZeRO-3 spreads it here"
        )
    rules = ZeroRules.of(settings)
    control = _connect()
    deepspeed = import_deepspeed()
    executor = attach(model, embeddings=section.embeddings, shared=section.shared, rescale=section.rescale)
    costs = measure_costs(model, executor, _image_shape(model))
    follower = PlanFollower(model, executor, section, rules, costs, control)
    rules.prepare(model, executor, follower.slot)
    if model_parameters is None and optimizer is None:
        model_parameters = model.parameters()
    if model_parameters is not None:
        model_parameters = _trained(model_parameters)
    made = deepspeed.initialize(
        # Its only use is the configuration's path, which we have read.
        args=None,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
        config=settings,
    )
    made[0].d2ft = follower
    follower.begin(made[0])
    return made  # type: ignore[no-any-return]


def _connect() -> Control:
    environment = detect()
    control = connect(environment, device_type="cuda" if torch.cuda.is_available() else "cpu")
    atexit.register(_end_together, control)
    return control


def _end_together(control: Control) -> None:
    """Ends MPI at a normal end of the script. Where a rank failed, not ending it lets the launcher end the others."""
    if not hasattr(sys, "last_value"):
        with suppress(LaunchError):
            control.barrier(_END_SECONDS)
            control.close()


def _trained(parameters: Any) -> list[Any]:
    """The trained ones of parameters, or of groups of them."""
    kept = []
    for item in parameters:
        if isinstance(item, dict):
            own = [parameter for parameter in item["params"] if parameter.requires_grad]
            kept += [{**item, "params": own}] if own else []
        elif item.requires_grad:
            kept.append(item)
    return kept


def _image_shape(model: VisionTransformer) -> tuple[int, int, int]:
    """(channel, height, width) that the model was made for."""
    projection, size = model.patch_embed.proj, model.patch_embed.img_size
    if size is None:
        raise ConfigError(
            f'the model has no image size: make it with img_size=, so that "{SECTION}" can count costs'
        )
    return int(projection.in_channels), int(size[0]), int(size[1])
