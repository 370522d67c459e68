"""`d2ft_hpc.initialize`: what `deepspeed.initialize` takes and gives back, with an engine that follows plans."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.optim import Optimizer

from d2ft_hpc.engines.deepspeed import DeepSpeedEngine
from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.engines.deepspeed_settings import check_settings
from d2ft_hpc.engines.engine import evaluated
from d2ft_hpc.engines.model_parallel import CutModel
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.engines.private_names import NEWEST_TESTED, newer_than_tested
from d2ft_hpc.engines.tensor import TensorParallelEngine
from d2ft_hpc.engines.zero import ZeroRules
from d2ft_hpc.errors import ConfigError, LaunchError, UnsupportedModelError
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.launch import Control, connect, detect
from d2ft_hpc.lifecycle.costs import costs_of_part
from d2ft_hpc.lifecycle.make_plan import reads_scores
from d2ft_hpc.parallel.head_split import check_parts, even_owner
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.parallel.stages import cut_stages, describe_stages, layer_flops
from d2ft_hpc.planning.communication_volume import ZERO
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection.build import count_scoring, selection_of
from d2ft_hpc.user_loop.attached import attached, loop_context
from d2ft_hpc.user_loop.batch_counter import BatchCounter
from d2ft_hpc.user_loop.pipeline_module import PipelineModule
from d2ft_hpc.user_loop.plan_printer import PlanPrinter
from d2ft_hpc.user_loop.planned_deepspeed import PlannedDeepSpeed
from d2ft_hpc.user_loop.record import LoopRecord
from d2ft_hpc.user_loop.section import SECTION, D2ftSection, require_length, require_options_for, split

_END_SECONDS = 25.0
"""Seconds that a rank waits for the others when its script ends."""


def initialize(
    args: Any = None,
    model: nn.Module | PipelineModule | None = None,
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
    it is: `engine(images)`, `engine.backward(loss)`, `engine.step()`, once for each micro-batch. Where a planner reads
    scores, the first batch runs dense and gives them, so each rank needs memory for a dense batch: unlike
    `d2ft-hpc train`, this fits no plan to a rank with less. `engine.d2ft` is the `PlannedDeepSpeed`.

    Under ZeRO 1 and 2, unless scores are read, a block runs on a few flat parameters, which DeepSpeed has to look after
    in place of many. The model shows its own parameters all the same, in the same memory, but they get no `.grad`.

    "tensor_parallel": {"autotp_size": N} cuts the model by head over N ranks; a `PipelineModule` is cut into stages,
    and its engine is DeepSpeed's with `train_batch`. Each rank then trains a part of rank 0's weights: `model` itself
    stays as it was, and `engine.d2ft.save(folder)` writes the trained one.

    Ranks meet as the launcher says (mpirun, srun, torchrun, deepspeed); `distributed_port` and `dist_init_required` are
    then of no use and ignored.

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
            'mpu=: the process groups are made here; set "tensor_parallel": {"autotp_size": N} in the JSON, or give a '
            "d2ft_hpc.PipelineModule"
        )
    pipeline = model if isinstance(model, PipelineModule) else None
    model = model.layers if isinstance(model, PipelineModule) else model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}: give one of timm or transformers, and for a pipeline wrap it in "
            f"d2ft_hpc.PipelineModule"
        )
    backbone = backbone_of(model)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            "model was made inside deepspeed.zero.Init: make it outside, ZeRO-3 spreads it here"
        )
    stages, tensor_ranks = _parts(settings, pipeline)
    if stages * tensor_ranks > 1:
        check_parts(family_of(backbone))
        if backbone is not model:
            raise ConfigError(
                f"model is a {type(model).__name__} around a {type(backbone).__name__}: ranks that hold parts of a "
                f"model need the {type(backbone).__name__} itself"
            )
        if not family_of(backbone).composes(backbone):
            raise UnsupportedModelError(
                f"{type(backbone).__name__} has a forward of its own, which ranks that hold parts of it do not run: "
                f"use neither tensor parallelism nor a pipeline"
            )
        if isinstance(optimizer, Optimizer):
            raise ConfigError(
                "optimizer= holds the parameters of the whole model, but each rank will train a part of it: give a "
                'function of the parameters (lambda parameters: AdamW(parameters, ...)), or "optimizer" in the JSON'
            )
        if section.cuda_graphs:
            raise ConfigError("d2ft.cuda_graphs=true: not where ranks hold parts of the model; remove it")
    # What cannot run is refused before anything starts.
    zero = ZeroRules.of(settings)
    check_settings(settings)
    if section.total_steps is None:
        section = section.model_copy(update={"total_steps": _scheduled_steps(settings)})
    require_options_for(backbone, section, f"{SECTION}.")
    require_length(section, f"{SECTION}.")
    control = connect(detect(), device_type="cuda" if torch.cuda.is_available() else "cpu")
    atexit.register(_end_together, control)
    for warning in newer_than_tested(NEWEST_TESTED):
        PlanPrinter(control).say(warning)
    import_deepspeed().init_distributed(auto_mpi_discovery=False)
    layout = RankLayout.of(control.world_size, control.rank, stages=stages, tensor_ranks=tensor_ranks)
    if layout.is_cut:
        _same_on_all_ranks(model)
    executor, sample_shape, costs = attached(backbone, model, section)
    flops = layer_flops(backbone, costs, sample_shape)
    placement = Placement(
        layout, cut_stages(flops, stages), even_owner(*executor.subnets.shape, layout.tensor_ranks)
    )
    if stages > 1:
        PlanPrinter(control).say(describe_stages(flops, placement.stages))
    selection = None
    if isinstance(section.options, SampleOptions):
        selection = selection_of(
            section.options, backbone, sample_shape, seed=section.seed, replica=layout.replica
        )
        selection.scorer.bind(partial(evaluated, model))
        device = next(model.parameters()).device
        costs = replace(costs, score_flops=count_scoring(selection, sample_shape, device))
    whole = model
    record = LoopRecord(section.results, section.model_dump(mode="json"), backbone, executor.subnets, costs)

    def options_for(part: nn.Module) -> dict[str, Any]:
        chosen = model_parameters
        if chosen is None and not isinstance(optimizer, Optimizer):
            chosen = whole.parameters()
        own = None if chosen is None else _of_part(chosen, whole, part)
        return {"model_parameters": own, "training_data": training_data, "collate_fn": collate_fn}

    settings.pop("tensor_parallel", None)  # blocks are cut by head, not by DeepSpeed
    cut = CutModel(model, executor, placement, control, lambda part: (optimizer, lr_scheduler), options_for)
    ours: DeepSpeedEngine | PipelineEngine
    if pipeline is not None:
        ours = PipelineEngine(cut, pipeline.loss_fn, settings)
    else:
        # The user's loop computes the loss: this function is never called.
        step: dict[str, Any] = {
            "loss_function": F.cross_entropy,
            "config": settings,
            "slot_source": lambda: ours.engine.d2ft.slot,
            "is_boundary": lambda: ours.engine.d2ft.is_boundary,
        }
        if layout.is_cut:
            ours = TensorParallelEngine(cut, **step)
        else:
            if isinstance(optimizer, Optimizer) and (
                frozen := _leave_out_frozen_groups(optimizer, lr_scheduler)
            ):
                PlanPrinter(control).say(
                    f"groups {frozen} of the optimizer have frozen parameters alone: left out"
                )
            ours = DeepSpeedEngine(
                model,
                executor,
                optimizer,
                lr_scheduler,
                **step,
                flattens=_can_flatten(zero, settings, section, optimizer),
                hides_flat=True,
                **options_for(model),
            )
    part_costs = costs_of_part(costs, flops, placement)
    if selection is not None and layout.is_cut:
        selection.scorer.bind(ours.logits)
        score_flops = count_scoring(selection, sample_shape, ours.engine.device)
        part_costs = replace(part_costs, score_flops=score_flops)
    counter = BatchCounter(part_costs, ours.executor, sample_shape)
    context = loop_context(
        section,
        costs,
        placement,
        slots=int(ours.engine.gradient_accumulation_steps()),
        micro_batch_size=int(ours.engine.train_micro_batch_size_per_gpu()),
        replicas_meet=zero.stage == 3,
        where=f"{SECTION}.",
    )
    planned_bytes = PlannedBytes(
        backbone,
        ours.executor,
        context,
        precision=next((kind for kind in ("bf16", "fp16") if settings.get(kind, {}).get("enabled")), "fp32"),
        data_parallel=ZERO[zero.stage],
        around=whole,
    )
    ours.engine.d2ft = PlannedDeepSpeed(ours, context, selection, control, counter, record, planned_bytes)
    return ours.made  # type: ignore[no-any-return]


def _can_flatten(zero: ZeroRules, settings: Mapping[str, Any], section: D2ftSection, optimizer: Any) -> bool:
    """Whether a block's parameters can be put together, with which DeepSpeed has a fifth of them to look after.

    Not where anything reads their single gradients (scores, and DeepSpeed without ZeRO), or names, orders or aligns
    them, or goes by their shapes or kinds (a function of the user's, Muon, autocast).
    """
    by_json = settings.get("optimizer", {}).get("type") or ""
    is_muon = "muon" in (type(optimizer).__name__ if optimizer is not None else by_json).lower()
    is_new = optimizer is None or (isinstance(optimizer, Optimizer) and not optimizer.state)
    has_kinds = is_muon or settings.get("torch_autocast", {}).get("enabled", False)
    of_zero = settings.get("zero_optimization", {})
    lays_out = any(of_zero.get(key, False) for key in ("round_robin_gradients", "parameter_alignment"))
    is_universal = settings.get("checkpoint", {}).get("load_universal", False)
    may_be = zero.stage in (1, 2) and not (lays_out or is_universal or has_kinds)
    return may_be and is_new and not reads_scores(section)


def _scheduled_steps(settings: Mapping[str, Any]) -> int | None:
    """Steps of the training, if DeepSpeed's configuration has a schedule of the learning rate that ends with it; else
    None."""
    scheduler = settings.get("scheduler")
    parameters = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    steps = parameters.get("total_num_steps") if isinstance(parameters, Mapping) else None
    return steps if isinstance(steps, int) and steps > 0 else None


def _parts(settings: Mapping[str, Any], pipeline: PipelineModule | None) -> tuple[int, int]:
    """Numbers of pipeline stages and tensor-parallel ranks that are asked for. Raises ConfigError if they are
    impossible.
    """
    autotp = settings.get("tensor_parallel", {})
    if extra := sorted(set(autotp) - {"autotp_size"}):
        raise ConfigError(f"tensor_parallel.{extra[0]}: blocks are cut by head; keep autotp_size alone")
    tensor_ranks = int(autotp.get("autotp_size", 1)) or 1
    in_json: Any = settings.get("pipeline", {}).get("stages", "auto")
    stages: Any = 1
    if pipeline is None:
        if in_json not in ("auto", 1):
            raise ConfigError(
                f"pipeline.stages={in_json}: the last stage needs the loss: give "
                f"model=d2ft_hpc.PipelineModule(model, loss_fn=...)"
            )
    else:
        stages = pipeline.num_stages or (in_json if in_json != "auto" else None)
        if stages is None or stages < 2:
            raise ConfigError(
                f"PipelineModule with num_stages={pipeline.num_stages}: give num_stages, or "
                f'"pipeline": {{"stages": N}} in the JSON, at least 2'
            )
    if stages * tensor_ranks == 1:
        return 1, 1
    if settings.get("fp16", {}).get("enabled", False):
        raise ConfigError("fp16 with a model cut over ranks: loss scaling was never tested there; use bf16")
    if stages > 1 and (zero := ZeroRules.of(settings).stage) > 1:
        raise ConfigError(
            f"zero_optimization.stage={zero} with a pipeline: its stages keep their gradients until the "
            f"batch's end, and DeepSpeed refuses; use stage 0 or 1"
        )
    return stages, tensor_ranks


def _same_on_all_ranks(model: nn.Module) -> None:
    """Gives all ranks rank 0's weights, on the device that they will train on: each will hold a part of them."""
    from deepspeed.accelerator import get_accelerator

    model.to(get_accelerator().current_device_name())
    for tensor in model.state_dict().values():
        distributed.broadcast(tensor, 0)


def _end_together(control: Control) -> None:
    """Ends MPI at a normal end of the script. Where a rank failed, not ending it lets the launcher end the others."""
    if not hasattr(sys, "last_value"):
        with suppress(LaunchError):
            control.barrier(_END_SECONDS)
            control.close()


def _of_part(parameters: Any, whole: nn.Module, part: nn.Module) -> list[Any]:
    """The trained parameters of a part that correspond to a whole model's parameters, or to groups of them."""
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    own = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}

    def of_this_part(given: Iterable[nn.Parameter | tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
        parameters = [each[1] if isinstance(each, tuple) else each for each in given]
        return [own[names[id(each)]] for each in parameters if names.get(id(each)) in own]

    given = list(parameters)
    if not any(isinstance(item, dict) for item in given):
        return of_this_part(given)
    groups = [{**group, "params": of_this_part(group["params"])} for group in given]
    return [group for group in groups if group["params"]]


def _leave_out_frozen_groups(optimizer: Optimizer, schedule: Any) -> list[int]:
    """ZeRO cannot partition a group without trained parameters, as of embeddings with a learning rate of their own;
    returns which groups were taken out. schedule: made for the optimizer, loses what it keeps for them."""
    groups = optimizer.param_groups
    frozen = [i for i, each in enumerate(groups) if not any(p.requires_grad for p in each["params"])]
    if frozen:
        _leave_out_of_schedule(schedule, frozen, len(groups))
    groups[:] = [group for index, group in enumerate(groups) if index not in frozen]
    return frozen


_LISTS_OF_TIMES = ("_milestones", "_schedule_phases", "decay_t", "noise_range_t")
"""Lists of torch's SequentialLR and OneCycleLR and of timm's schedules whose length does not depend on the groups."""


def _leave_out_of_schedule(schedule: Any, frozen: Sequence[int], groups: int) -> None:
    """torch's, timm's and DeepSpeed's schedules keep lists with a value for each of the optimizer's groups, under many
    names; those that consist of others have these in `_schedulers`."""
    for name, values in vars(schedule).items() if hasattr(schedule, "__dict__") else ():
        if name == "_schedulers":
            for inner in values:
                _leave_out_of_schedule(inner, frozen, groups)
        elif isinstance(values, list) and len(values) == groups and name not in _LISTS_OF_TIMES:
            values[:] = [value for index, value in enumerate(values) if index not in frozen]
