"""Every undocumented name of libraries that is used: what it means, and how to tell that it still does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from d2ft_hpc.engines.private_names import DIVIDES_FROM, PADDING, SCALE_AT_MINIMUM, SCALER_COUNTERS


@dataclass(frozen=True)
class PrivateName:
    """A name of a module, a class, or of objects that a class makes."""

    path: str
    """module:attribute, the attribute with dots."""
    says: str = ""
    """Text that the module's source contains if the name still means the same; without one, it is enough that the
    name exists. Names of objects exist only with an object, so for them the text is where the source sets them."""
    since: str = "0"
    """Version of the library that has it first."""

    @property
    def library(self) -> str:
        return self.path.partition(".")[0].partition(":")[0]

    def fault(self) -> str | None:
        """What is not as expected in the installed library; None if nothing is."""
        try:
            is_older = Version(version(self.library)) < Version(self.since)
        except PackageNotFoundError:  # an extra
            return None
        if is_older:
            return None
        module_name, _, attribute = self.path.partition(":")
        try:
            module = import_module(module_name)
        except ImportError as error:
            return f"{self.path}: {error}"
        source = inspect.getsource(module)
        if self.says and self.says not in source:
            return f"{self.path}: {module_name} does not say {self.says!r} any more"
        owner: Any = module
        for part in attribute.split("."):
            if not hasattr(owner, part):
                is_of_objects = inspect.isclass(owner) and part in self.says
                return None if is_of_objects else f"{self.path}: there is no {part}"
            owner = getattr(owner, part)
        return None


def _deepspeed() -> Iterator[PrivateName]:
    yield PrivateName("deepspeed.ops:__compatible_ops__")
    engine = "deepspeed.runtime.engine:DeepSpeedEngine"
    yield PrivateName(f"{engine}.micro_steps", "self.micro_steps += 1")
    yield PrivateName(f"{engine}.global_steps", "self.global_steps += 1")
    yield PrivateName(
        f"{engine}.dp_world_size", "self.dp_world_size = groups._get_data_parallel_world_size()"
    )
    yield PrivateName(f"{engine}.basic_optimizer", "self.basic_optimizer = basic_optimizer")
    yield PrivateName(
        f"{engine}.optimizer", "self.optimizer = self._configure_zero_optimizer(basic_optimizer)"
    )
    yield PrivateName(f"{engine}.gradient_accumulation_steps")
    yield PrivateName(f"{engine}.get_global_grad_norm")
    yield PrivateName(
        f"{engine}._get_gradients_for_reduction",
        "non_expert_grads, expert_grads = self._get_gradients_for_reduction()",
    )
    yield PrivateName(
        f"{engine}._backward_prologue_per_tensor",
        "preprocess_per_tensor_fn=self._backward_prologue_per_tensor",
        since=DIVIDES_FROM,
    )
    bf16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
    yield PrivateName(f"{bf16}.fp32_groups_flat_partition", "self.fp32_groups_flat_partition = []")
    yield PrivateName(f"{bf16}.fp32_groups_has_gradients", "self.fp32_groups_has_gradients.append([False]")
    unfused = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"
    yield PrivateName(f"{unfused}.fp16_groups", "self.fp16_groups = []")
    yield PrivateName(f"{unfused}.fp32_groups", "self.fp32_groups = []")
    zero = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
    yield PrivateName(f"{zero}.single_partition_of_fp32_groups", "self.single_partition_of_fp32_groups = []")
    mappings = "self._param_slice_mappings = self._create_param_mapping()"
    for optimizer in (zero, bf16):
        yield PrivateName(f"{optimizer}._param_slice_mappings", mappings)
        yield PrivateName(f"{optimizer}._hp_mapping", "lp._hp_mapping.get_hp_fragment_address()")
    yield PrivateName(f"{zero}.{PADDING}", f"state_dict[PARAM_ALIGNMENT_PADDINGS] = self.{PADDING}", "0.19.8")
    yield PrivateName(f"{engine}._get_zero_param_shapes", "param_shapes=self._get_zero_param_shapes()")
    yield PrivateName(f"{engine}.param_names", "self.param_names = {param: name for name, param in")
    fragment = "deepspeed.utils.tensor_fragment:tensor_fragment"
    for name in ("lp_fragment_address", "hp_fragment_address"):
        yield PrivateName(f"{fragment}.{name}", f"{name}: fragment_address")
    for name in ("get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad"):
        says = f"lp_param.{name} = types.MethodType({name}, lp_param)"
        yield PrivateName(f"deepspeed.utils.mixed_precision_linkage:{name}", says)
    yield PrivateName(
        "deepspeed.utils.tensor_fragment:safe_get_full_grad", "if hasattr(param, '_hp_mapping')"
    )
    zero3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
    yield PrivateName(f"{zero3}.fp32_partitioned_groups_flat", "self.fp32_partitioned_groups_flat = []")
    for optimizer in (zero, zero3):
        yield PrivateName(f"{optimizer}.cur_scale", "return self.loss_scaler.cur_scale")
        yield PrivateName(f"{optimizer}.loss_scaler", "self.loss_scaler = ")
    spread = "deepspeed.runtime.zero.partition_parameters:Init"
    for name in ("ds_id", "ds_shape", "ds_tensor", "ds_process_group"):
        yield PrivateName(f"{spread}.{name}", f"param.{name} = ")
    yield PrivateName(f"{spread}._allgather_params_coalesced", "self._allgather_params_coalesced(all_gather_")
    yield PrivateName(f"{spread}.ds_numel", "param.ds_tensor.ds_numel = ")
    scaler = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"
    for name in SCALER_COUNTERS:
        yield PrivateName(f"{scaler}.{name}", f"self.{name} = ")
    yield PrivateName(f"{scaler}.dynamic", "self.dynamic = True")
    yield PrivateName(f"{scaler}.update_scale", SCALE_AT_MINIMUM)
    pipeline = "deepspeed.runtime.pipe.engine:PipelineEngine"
    yield PrivateName(f"{pipeline}._INSTRUCTION_MAP", "MethodType(self._INSTRUCTION_MAP[type(cmd)], self)")
    yield PrivateName(f"{pipeline}._exec_backward_pass", "def _exec_backward_pass(self, buffer_id):")
    yield PrivateName(f"{pipeline}._exec_recv_activations", "def _exec_recv_activations(self, buffer_id):")
    yield PrivateName(f"{pipeline}._exec_send_activations", "def _exec_send_activations(self, buffer_id):")
    yield PrivateName(f"{pipeline}._recv_tensor_meta", "def _recv_tensor_meta(self, send_stage):")
    yield PrivateName(f"{pipeline}._send_tensor_meta", "def _send_tensor_meta(self, buffer, recv_stage):")
    yield PrivateName(f"{pipeline}.is_last_stage")
    yield PrivateName(f"{pipeline}.micro_batches", "self.micro_batches = self.gradient_accumulation_steps()")
    yield PrivateName(f"{pipeline}.grad_layer", "grad_tensors = self.grad_layer")
    yield PrivateName(f"{pipeline}.pipe_buffers", "self.pipe_buffers['outputs'][buffer_id]")
    yield PrivateName(f"{pipeline}.dp_group_loss", "self.dp_group_loss = ")
    yield PrivateName(f"{pipeline}.grid", "self.grid = self.module._grid")
    yield PrivateName(f"{pipeline}.stage_id", "self.stage_id = self.grid.get_stage_id()")
    yield PrivateName(f"{pipeline}.prev_stage", "self.prev_stage = self.stage_id - 1")
    yield PrivateName(f"{pipeline}.next_stage", "self.next_stage = self.stage_id + 1")
    yield PrivateName("deepspeed.runtime.pipe.module:PipelineModule.mpu")
    for instruction in (
        "BackwardPass",
        "ForwardPass",
        "RecvActivation",
        "RecvGrad",
        "ReduceTiedGrads",
        "SendActivation",
        "SendGrad",
    ):
        yield PrivateName(f"deepspeed.runtime.pipe.schedule:{instruction}", f"class {instruction}(")
    yield PrivateName("deepspeed.runtime.pipe.topology:PipeModelDataParallelTopology")
    for name in ("get_model_parallel_group", "get_slice_parallel_group", "stage_to_global"):
        yield PrivateName(f"deepspeed.runtime.pipe.topology:PipelineParallelGrid.{name}")


def _torch_and_timm() -> Iterator[PrivateName]:
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        yield PrivateName(f"torch:Tensor.{name}")
    fsdp = "torch.distributed.fsdp._fully_shard"
    yield PrivateName(f"{fsdp}._fully_shard:FSDPModule._get_fsdp_state")
    yield PrivateName(f"{fsdp}._fsdp_state:FSDPState._fsdp_param_group", "self._fsdp_param_group")
    group = f"{fsdp}._fsdp_param_group:FSDPParamGroup"
    yield PrivateName(f"{group}.modules", "self.modules = modules")
    yield PrivateName(f"{group}.mesh_info", "self.mesh_info = mesh_info")
    yield PrivateName(f"{group}.reduce_grads", "if not self.reduce_grads:")
    yield PrivateName(f"{group}.all_reduce_grads", "self.all_reduce_grads: bool = True")
    yield PrivateName(f"{group}._reshard_after_forward", "self.post_forward_mesh_info is not None")
    yield PrivateName(f"{group}.reshard_after_backward", "self.reshard_after_backward: bool = True")
    ddp = "torch.nn.parallel.distributed:DistributedDataParallel"
    yield PrivateName(f"{ddp}._get_ddp_logging_data")
    yield PrivateName(f"{ddp}._register_builtin_comm_hook", "ALLREDUCE")
    yield PrivateName(f"{ddp}._active_ddp_module", "DistributedDataParallel._active_ddp_module = self")
    yield PrivateName(f"{ddp}.require_backward_grad_sync", "self.require_backward_grad_sync = False")
    schedule = "torch.optim.lr_scheduler:LRScheduler"
    yield PrivateName(f"{schedule}._last_lr", "self._last_lr")
    yield PrivateName(f"{schedule}._step_count", "self._step_count")
    module = "torch.nn.modules.module:Module"
    yield PrivateName(f"{module}._parameters", '"_parameters"')
    yield PrivateName(f"{module}._is_replica", "replica._is_replica = True")
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        yield PrivateName(f"{module}.{hooks}", f"self.{hooks}")
    yield PrivateName("torch:Tensor._version")
    yield PrivateName("torch.autograd:Variable._execution_engine")
    yield PrivateName("torch:_C")
    yield PrivateName("torch:_C._current_graph_task_id")
    for name in ("_dynamo_restore_local_dispatch_key_set", "_dynamo_save_local_dispatch_key_set"):
        yield PrivateName(f"torch:_C.{name}", since="2.14")
    yield PrivateName("torch:_C._PreserveDispatchKeyGuard", since="2.14")
    yield PrivateName("torch:_C._dispatch_tls_set_dispatch_key_included", since="2.14")
    for operator in ("add_", "copy_", "div", "mul_", "norm", "zero_"):
        yield PrivateName(f"torch:_foreach_{operator}")
    yield PrivateName("torch.utils._python_dispatch:_get_current_dispatch_mode")
    for model in ("vision_transformer:VisionTransformer", "eva:Eva"):
        yield PrivateName(f"timm.models.{model}._pos_embed", "def _pos_embed(self, x")
    yield PrivateName("timm.models.beit:Attention._get_rel_pos_bias")
    yield PrivateName("timm.models.naflexvit:NaFlexVit._forward_embeds")
    for encoder in ("qwen3_vit:Qwen3VitEncoder", "deepseek_vit:DeepseekVitEncoder"):
        yield PrivateName(f"timm.models.{encoder}._pos_embed", "def _pos_embed(self, x", since="1.0.31")
    yield PrivateName("timm.layers.diff_attention:DiffAttention._compute_lambda", since="1.0.31")


def _transformers() -> Iterator[PrivateName]:
    since = "5.24"
    layer = "transformers.modeling_layers:GradientCheckpointingLayer"
    recomputes = "return self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)"
    yield PrivateName(f"{layer}.gradient_checkpointing", recomputes, since)
    yield PrivateName(f"{layer}._gradient_checkpointing_func", recomputes, since)
    rotary = ("dinov3_vit", "llama", "qwen2", "qwen3")
    for model in ("vit", "dinov2", "dinov2_with_registers", "clip", "siglip", *rotary):
        module = f"transformers.models.{model}.modeling_{model}"
        yield PrivateName(f"{module}:ALL_ATTENTION_FUNCTIONS", "self.config._attn_implementation", since)
        yield PrivateName(f"{module}:eager_attention_forward", "attn_output, attn_weights", since)
        if model in rotary:
            yield PrivateName(f"{module}:apply_rotary_pos_emb", "def apply_rotary_pos_emb", since)


PRIVATE_NAMES = (*_deepspeed(), *_torch_and_timm(), *_transformers())
