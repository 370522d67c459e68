"""Every use of what DeepSpeed does not document, so that an upgrade breaks this file alone;
`tests/private_names.py` lists what is used."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from d2ft_hpc.engines.private_names import (
    DIVIDES_FROM,
    PADDING,
    SCALE_AT_MINIMUM,
    SCALER_COUNTERS,
    WAITS_FROM,
    changed,
    expect,
    replace,
)
from d2ft_hpc.errors import DivergedError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.flat_parameters import Part
from d2ft_hpc.launch.agree import AgreedError
from d2ft_hpc.parallel.rank_layout import RankLayout

MASTER_WEIGHTS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}
"""The optimiser's attribute that holds its flat float32 weights, by ZeRO stage; BF16_MASTER_WEIGHTS for bf16 without
ZeRO."""
BF16_MASTER_WEIGHTS = "fp32_groups_flat_partition"


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the minute that its first use on a CPU would spend on compiling an all-reduce."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    if "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ["DS_ACCELERATOR"] == "cpu" and Version(version("deepspeed")) < Version(WAITS_FROM):
        _gather_one_by_one()
    return deepspeed


@cache
def _gather_one_by_one() -> None:
    """Has ZeRO 3 gather parameters that it needs at once one after the other.

    Older DeepSpeeds start all gathers and wait for the last. A GPU's come in order, those of CPUs do not, so that what
    comes next would now and then compute with weights that are not there yet.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    means = "which gathers parameters and waits for the last"
    gather = expect(Init, "_allgather_params_coalesced", means)

    @wraps(gather)
    def one_by_one(init: Any, param_list: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        for parameter in param_list:
            gather(init, [parameter], *args, **kwargs)

    replace(Init, "_allgather_params_coalesced", one_by_one, means)


def cast_buffers(executor: PlanExecutor, dtype: torch.dtype) -> None:
    """Gives the parameters' type to blocks' buffers, which DeepSpeed from 0.19.8 on leaves as they are."""
    for block in executor.blocks.values():
        executor.subnets.family.cast_buffers(block, dtype)


def loss_scale(engine: Any) -> float:
    """The factor by which `engine.backward` multiplies a loss, gradient accumulation included."""
    scale = 1.0
    if engine.fp16_enabled():
        scale = expect(engine.optimizer, "cur_scale", "by which losses are scaled in fp16")
    return float(scale) / int(engine.gradient_accumulation_steps())


def flat_master_weights(engine: Any) -> list[Tensor] | None:
    """This rank's flat float32 partitions of the trained weights, which the optimiser's states belong to.

    None without ZeRO: torch's optimiser then has a state for each parameter.
    """
    for name in {*MASTER_WEIGHTS.values(), BF16_MASTER_WEIGHTS}:
        partitions = getattr(engine.optimizer, name, None)
        if partitions is not None:
            return list(partitions)
    return None


def unpartitioned_master_weights(model: nn.Module, engine: Any) -> dict[str, Tensor]:
    """Without ZeRO: the tensor that the optimiser updates for each trained parameter, by the parameter's name in
    `model`.

    The parameter itself in fp32, DeepSpeed's float32 copy of it in bf16.
    """
    trained: dict[str, Tensor] = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if engine.optimizer is engine.basic_optimizer:
        return trained
    own, kept = (
        expect(engine.optimizer, name, "the trained weights and their float32 copies")
        for name in ("fp16_groups", "fp32_groups")
    )
    copies = {
        id(parameter): copy
        for of_own, of_kept in zip(own, kept, strict=True)
        for parameter, copy in zip(of_own, of_kept, strict=True)
    }
    for name, parameter in trained.items():
        copy = copies.get(id(parameter))
        if copy is None or copy.dtype != torch.float32 or copy.shape != parameter.shape:
            raise changed(engine.optimizer, f"keeps no float32 copy of {name} in fp32_groups")
    return {name: copies[id(parameter)] for name, parameter in trained.items()}


def write_master_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Puts `value`, float32 of the parameter's full shape, into the partitions of all ranks' master weights."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_tensor"):
        safe_set_full_fp32_param(parameter, value)
        return
    # ZeRO-3's own setter of full values fails where the ranks' number does not divide the parameter's size.
    part = parameter.ds_tensor.ds_numel
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    padded = torch.nn.functional.pad(value.flatten(), (0, part * ranks - value.numel()))
    safe_set_local_fp32_param(parameter, padded.narrow(0, part * own, part))


def take_step(engine: Any) -> bool:
    """The optimiser's step; false where fp16's loss scaler leaves it out. Raises DivergedError on all ranks where the
    scaler has no smaller scale left to try."""
    try:
        engine.step()
    except Exception as error:
        if SCALE_AT_MINIMUM not in str(error):
            raise
        raise DivergedError("gradients overflow in fp16 even with the smallest loss scale") from AgreedError()
    return not engine.fp16_enabled() or bool(engine.was_step_applied())


def loss_scaler_numbers(engine: Any) -> dict[str, float]:
    """The counters of fp16's dynamic loss scaler; empty for other precisions."""
    scaler = _dynamic_scaler(engine)
    return {} if scaler is None else {name: float(getattr(scaler, name)) for name in SCALER_COUNTERS}


def restore_loss_scaler(engine: Any, numbers: Mapping[str, float]) -> None:
    scaler = _dynamic_scaler(engine)
    for name in SCALER_COUNTERS:
        if scaler is not None and name in numbers:
            setattr(scaler, name, type(getattr(scaler, name))(numbers[name]))


def _dynamic_scaler(engine: Any) -> Any:
    """None where losses are scaled by a fixed number, or not at all."""
    if not engine.fp16_enabled():
        return None
    scaler = expect(engine.optimizer, "loss_scaler", "which scales losses in fp16")
    return scaler if expect(scaler, "dynamic", "whether the scale changes") else None


@contextmanager
def whole(parameter: nn.Parameter, *, written: bool = False) -> Iterator[Tensor]:
    """The parameter's data, gathered from all ranks where ZeRO-3 spreads it; written: what rank 0 writes stays."""
    import deepspeed

    if not hasattr(parameter, "ds_tensor"):
        if parameter.numel() == 0:
            raise changed(parameter, "is spread over ranks, but has no ds_tensor")
        yield parameter.data
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if written else None):
        yield parameter.data


def name_parts(engine: Any, parts_of: Callable[[str], Sequence[Part]]) -> None:
    """Lets checkpoints of ZeRO 1 and 2 name the parts of flat parameters, which lie in their order, as without these,
    and `deepspeed.utils` read and write what is kept of each.

    parts_of: of a parameter by its name in the model; none of one that is not flat.
    """
    means = "which says what lies where in partitions of the weights"
    shapes = expect(engine, "_get_zero_param_shapes", means)

    def of_parts() -> list[dict[str, torch.Size]]:
        return [
            OrderedDict(
                (path, of_path)
                for name, shape in group.items()
                for path, of_path in [(part.path, part.shape) for part in parts_of(name)] or [(name, shape)]
            )
            for group in shapes()
        ]

    replace(engine, "_get_zero_param_shapes", of_parts, means)
    by_name = {name: parameter for parameter, name in expect(engine, "param_names", means).items()}
    fragments = [
        OrderedDict(
            (path, address)
            for name, fragment in group.items()
            for path, address in _fragments(by_name[name], parts_of(name)) or [(name, fragment)]
        )
        for group in expect(engine.optimizer, "_param_slice_mappings", means)
    ]
    replace(engine.optimizer, "_param_slice_mappings", fragments, means)
    if hasattr(engine.optimizer, PADDING):  # the newest ones
        nothing = [[0] * len(of_group) for of_group in of_parts()]
        replace(engine.optimizer, PADDING, nothing, means)
    for name, flat in by_name.items():
        for part in parts_of(name):
            if part.parameter is not None:
                engine.param_names[part.parameter] = part.path
                _link(part.parameter, flat, part.begin)


def _link(part: Any, flat: Any, begin: int) -> None:
    """Gives a part of a flat parameter the functions that DeepSpeed gives parameters of ZeRO 1 and 2, behind its
    `safe_get_full_grad` and the like.

    begin: the part's place in the flat parameter. They write what they read with all ranks, as those of ZeRO 3 do.
    """
    from deepspeed import utils

    def own(whole: Tensor) -> Tensor:
        return whole.flatten().narrow(0, begin, part.numel()).view_as(part)

    def written(whole: Tensor, value: Tensor) -> Tensor:
        own(whole).copy_(value)
        return whole

    def get_gradient() -> Tensor | None:
        whole = utils.safe_get_full_grad(flat)
        return None if whole is None else own(whole)

    def set_gradient(value: Tensor) -> None:
        whole = utils.safe_get_full_grad(flat)
        if whole is not None:
            utils.safe_set_full_grad(flat, written(whole, value))

    def get(key: str | None = None) -> Tensor:
        return own(flat.get_full_hp_param(key)).clone()

    def set_(value: Tensor, key: str | None = None) -> None:
        flat.set_full_hp_param(written(flat.get_full_hp_param(key), value), key)

    part._hp_mapping = None  # that it is there is asked; what lies where is the flat parameter's
    part.get_full_hp_param, part.set_full_hp_param = get, set_
    part.get_full_hp_grad, part.set_full_hp_grad = get_gradient, set_gradient


def after_moves(engine: Any, follow: Callable[[], None]) -> None:
    """Has `follow` run whenever the optimiser of ZeRO 1 and 2 puts parameters into its memory: in its steps, which
    undo what a script did to their `data`, and where a script has states moved."""

    def then_follow(move: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(move)
        def move_and_follow(*args: Any, **kwargs: Any) -> Any:
            result = move(*args, **kwargs)
            follow()
            return result

        return move_and_follow

    for name in ("step", "offload_states", "reload_states"):
        if hasattr(engine.optimizer, name):  # older ones move no states
            setattr(engine.optimizer, name, then_follow(getattr(engine.optimizer, name)))


def _fragments(parameter: Any, parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Where this rank's partition has what of each part of a flat parameter."""
    found = []
    mapping = expect(parameter, "_hp_mapping", "what a partition has of a parameter")
    own, kept = mapping.lp_fragment_address, mapping.hp_fragment_address
    for part in parts:
        first = max(part.begin, own.start)
        end = min(part.begin + part.shape.numel(), own.start + own.numel)
        if first < end:
            found.append((part.path, type(kept)(end - first, kept.start + first - own.start)))
    return found


def grid_of(layout: RankLayout) -> Any:
    """DeepSpeed's process groups for a layout, which serve it as `mpu`; on all ranks together."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the coordinates of every rank
        return PipelineParallelGrid(topology=topology_of(layout))


def topology_of(layout: RankLayout) -> Any:
    """DeepSpeed's description of a layout."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(
        num_pp=layout.stages, num_mp=layout.tensor_ranks, num_dp=layout.replicas
    )


def exchange_both_ways(pipeline_engine: Any, is_needed: Callable[[int, int], bool]) -> None:
    """Lets neighbouring stages send each other a gradient and the next activations at the same time, where DeepSpeed
    sends one after the other, and a gradient only where it is needed.

    is_needed: of the stage that sends a gradient and the micro-batch's place in the batch; the same on all ranks. The
    stage below goes on with zeros, so that every micro-batch has its backward.
    """
    from deepspeed.runtime.pipe import schedule

    dist.barrier()  # NCCL connects a group in its first call, which two stages alone would wait in
    sent, received = itertools.count(), itertools.count()
    pair: list[dist.P2POp] = []  # of one exchange with one stage
    under_way: list[Any] = []

    def add(operation: Callable[..., Any], tensor: Tensor, engine: Any, stage: int) -> None:
        pair.append(dist.P2POp(operation, tensor, engine.grid.stage_to_global(stage_id=stage)))

    def start() -> None:
        # Receives first: gloo tells a sender that there is room, on the way that its own data would go before.
        pair.sort(key=lambda each: each.op is not dist.irecv)
        if pair:
            under_way.extend(dist.batch_isend_irecv(pair))
        pair.clear()

    def send_activation(engine: Any, buffer_id: int) -> None:
        if not engine.module.training:
            type(engine)._exec_send_activations(engine, buffer_id)
            return
        outputs = engine.pipe_buffers["outputs"][buffer_id].detach()
        engine._send_tensor_meta(outputs, engine.next_stage)
        add(dist.isend, outputs, engine, engine.next_stage)
        start()

    def receive_activation(engine: Any, buffer_id: int) -> None:
        if not engine.module.training:
            type(engine)._exec_recv_activations(engine, buffer_id)
            return
        inputs = torch.empty_like(engine._recv_tensor_meta(engine.prev_stage))
        add(dist.irecv, inputs, engine, engine.prev_stage)
        start()
        engine.pipe_buffers["inputs"][buffer_id] = inputs.detach().requires_grad_()

    def send_gradient(engine: Any, buffer_id: int) -> None:
        start()
        inputs = engine.pipe_buffers["inputs"][buffer_id]
        if is_needed(engine.stage_id, next(sent) % engine.micro_batches):
            add(dist.isend, inputs.grad, engine, engine.prev_stage)
        engine.pipe_buffers["inputs"][buffer_id] = None

    def receive_gradient(engine: Any, buffer_id: int) -> None:
        start()
        outputs = engine.pipe_buffers["outputs"][buffer_id]
        if is_needed(engine.stage_id + 1, next(received) % engine.micro_batches):
            engine.grad_layer = torch.empty_like(outputs)
            add(dist.irecv, engine.grad_layer, engine, engine.next_stage)
        else:
            engine.grad_layer = torch.zeros_like(outputs)

    def after_messages(run: Callable[..., None]) -> Callable[..., None]:
        def wait_and_run(engine: Any, **arguments: Any) -> None:
            start()
            for message in under_way:
                message.wait()
            under_way.clear()
            run(engine, **arguments)

        return wait_and_run

    own = {
        schedule.SendActivation: send_activation,
        schedule.RecvActivation: receive_activation,
        schedule.SendGrad: send_gradient,
        schedule.RecvGrad: receive_gradient,
    }
    waiting = {
        instruction: after_messages(pipeline_engine._INSTRUCTION_MAP[instruction])
        for instruction in (schedule.ForwardPass, schedule.BackwardPass, schedule.ReduceTiedGrads)
    }
    _instruct(pipeline_engine, {**own, **waiting})


def _instruct(pipeline_engine: Any, own: Mapping[Any, Callable[..., None]]) -> None:
    """Replaces the engine's functions for pipeline instructions by `own`. Raises LibraryError where the engine has
    none."""
    means = "which says how each instruction of a schedule is carried out"
    known = expect(pipeline_engine, "_INSTRUCTION_MAP", means)
    for instruction in own:
        if instruction not in known:
            raise changed(pipeline_engine, f"knows no instruction {instruction.__name__}")
    replace(pipeline_engine, "_INSTRUCTION_MAP", {**known, **own}, means)


def average_over_micro_batches(pipeline_engine: Any) -> None:
    """Makes a pipeline's gradients the mean over micro-batches, as those of DeepSpeed's other engines are.

    Older pipelines sum them (DeepSpeed's issue 7773), or divide those of a stage again for each stage above (8152).
    """
    if Version(version("deepspeed")) >= Version(DIVIDES_FROM):
        if not pipeline_engine.is_last_stage():  # what comes from above is divided
            replace(
                pipeline_engine,
                "_backward_prologue_per_tensor",
                lambda gradient: gradient,
                "which divides gradients by the number of micro-batches",
            )
        return
    from deepspeed.runtime.pipe import schedule

    def divide_and_backward(engine: Any, buffer_id: int) -> None:
        if engine.is_last_stage():
            engine.loss = engine.loss / engine.micro_batches
        type(engine)._exec_backward_pass(engine, buffer_id)

    _instruct(pipeline_engine, {schedule.BackwardPass: divide_and_backward})


def reduce_needed_gradients(engine: Any, needed: Callable[[], Sequence[bool]]) -> None:
    """Without ZeRO, lets an engine reduce only some gradients between replicas; the others must be zero on all.

    needed: for each trained parameter, in the model's order, whether its gradient must be reduced; the same on all
    replicas. In fp32 only: in bf16 DeepSpeed's optimiser names the gradients itself.
    """
    means = "which lists the gradients that replicas reduce"
    every = expect(engine, "_get_gradients_for_reduction", means)

    def of_needed() -> Any:
        gradients, of_experts = every()
        return [each for each, is_needed in zip(gradients, needed(), strict=True) if is_needed], of_experts

    replace(engine, "_get_gradients_for_reduction", of_needed, means)


def zero_missing_master_gradients(engine: Any) -> None:
    """Before a batch: lets DeepSpeed's bf16 optimiser count a gradient that never comes as the zeros it holds for it.

    It would leave such a gradient out of norm and clipping, also where other replicas gave it, so that replicas clip
    differently; and on a rank where none comes it fails. A zero in the parameter's own gradient does not help if
    DeepSpeed drops it before the first backward (0.16.4), or takes what a backward gives alone
    (bf16.immediate_grad_update, the default in 0.16.9).
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(engine.optimizer, BF16_Optimizer):
        has_gradients = expect(
            engine.optimizer, "fp32_groups_has_gradients", "which gradients count in norm and clipping"
        )
        has_gradients[:] = [[True] * len(of_group) for of_group in has_gradients]


def loss_of_replica(pipeline_engine: Any) -> float:
    """Mean loss of the micro-batches that `train_batch` just ran in this replica; known on every stage."""
    return float(pipeline_engine.dp_group_loss)
