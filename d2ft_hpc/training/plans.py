"""Scores, plans and their broadcast during a run."""

from __future__ import annotations

import copy
import hashlib
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from d2ft_hpc import __version__
from d2ft_hpc.config import EngineConfig, PlanConfig
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.engines.engine import LossFunction, MicroBatch
from d2ft_hpc.errors import DataError, PlanError
from d2ft_hpc.launch import Control, share
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.metering import meter
from d2ft_hpc.metering.memory import release_unused
from d2ft_hpc.parallel.layout import Layout, Placement
from d2ft_hpc.parallel.tensor import layouts_of
from d2ft_hpc.planning import BUDGET_EPSILON, PlanProblem, SkipPlan, plan_samples, solve
from d2ft_hpc.planning.messages import TokenLayout
from d2ft_hpc.planning.step_time import StepTime
from d2ft_hpc.score_table import SCORES
from d2ft_hpc.scores import Scores, gradient_scores, scores_of_weights
from d2ft_hpc.scores.measured import ScoreCache, digest
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.plan_costs import PlanCosts


def is_due(config: PlanConfig, *, epoch: int, step_of_epoch: int, steps_done: int) -> bool:
    """Whether a plan is to be made before this step; steps and epochs count from 0."""
    every = config.replan.every
    if every is None:
        return steps_done == 0
    if config.replan.unit == "epochs":
        return step_of_epoch == 0 and epoch % every == 0
    return steps_done % every == 0


def measure_scores(job: Job, model: nn.Module, loss_function: LossFunction, watch: Watch) -> Scores | None:
    """Scores averaged over the first batches of the sampler's epoch; on all ranks together, the same on each.

    None for planners that read no scores.
    """
    config = job.config.plan
    if not config.entry.reads_scores or config.file is not None:
        return None
    start = time.perf_counter()
    if config.score_cache is None:
        return _measure(job, model, loss_function, watch, start)
    cache = ScoreCache(Path(config.score_cache))
    key = _cache_key(job, model)
    if kept := share(job.control, lambda: cache.read(key), "the cached scores"):
        return Scores.from_bytes(kept)
    scores = _measure(job, model, loss_function, watch, start)
    if job.control.rank == 0:
        try:
            cache.write(key, scores)
        except DataError as error:  # they have been measured: the run goes on with them
            print_line(f"d2ft-hpc: warning: {error}")
    return scores


def _probe(job: Job) -> Iterator[list[MicroBatch]]:
    # The epoch's first batches, also where the run resumed in mid-epoch.
    sampler = copy.copy(job.sampler)
    sampler.set_epoch(job.sampler.epoch)
    loader = train_loader(job.train_set, sampler, device=job.device)
    return islice(batches_of(job, loader), job.config.plan.probe_batches)


def _measure(job: Job, model: nn.Module, loss_function: LossFunction, watch: Watch, start: float) -> Scores:
    config, subnets = job.config.plan, job.executor.subnets
    names = (config.forward_score, config.backward_score)
    gradient_names = [name for name in names if SCORES[name].reads_gradients]
    autocast_dtype = torch.bfloat16 if job.config.engine.precision == "bf16" else None
    lora = job.config.model.lora
    adapters = lora is None or lora.scores == "adapters"
    with meter() as metered:
        measured = [
            [
                gradient_scores(
                    model,
                    subnets,
                    *pair,
                    loss_function,
                    gradient_names,
                    autocast_dtype=autocast_dtype,
                    adapters=adapters,
                )
                for pair in batch
            ]
            for batch in (watch.along(_probe(job)) if gradient_names else ())
        ]
    release_unused(job.device)
    rows: dict[str, np.ndarray] = {
        name: rows_of_all(
            job.control,
            torch.stack([torch.cat([of_pair[name] for of_pair in batch]) for batch in measured]).mean(0),
            job.layout,
        )
        for name in gradient_names
    }
    for name in set(names) - set(gradient_names):
        of_all_rows = scores_of_weights(SCORES[name], model, subnets, adapters).cpu().numpy()
        rows[name] = np.broadcast_to(of_all_rows, job.plan_shape)
    flops = sum(
        struct.unpack("<d", part)[0] for part in job.control.all_gather(struct.pack("<d", metered.flops))
    )
    forward, backward = (rows[name] for name in names)
    return Scores(forward, backward, time.perf_counter() - start, *names, flops)


def _cache_key(job: Job, model: nn.Module) -> str:
    """Of all ranks' weights and images and of the settings that decide the scores."""
    config = job.config
    settings = {
        "version": __version__,
        "scores": [config.plan.forward_score, config.plan.backward_score],
        "label_smoothing": config.train.label_smoothing,
        "precision": config.engine.precision,
        "lora": config.model.lora and config.model.lora.scores,
        "shape": job.plan_shape,
    }
    tensors = (tensor for batch in _probe(job) for pair in batch for tensor in pair)
    parts = job.control.all_gather(digest(model, tensors, settings))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def make_plan(
    job: Job,
    placement: Placement,
    costs: PlanCosts,
    scores: Scores | None,
    index: int,
    step: int,
    *,
    same_rows: bool = False,
) -> SkipPlan:
    """Rank 0 solves; every rank gets the same plan or raises the same PlanError.

    index: how many plans were made before; planners that draw draw anew for each. step: the first one under the plan.
    same_rows: all replicas follow the same rows.
    """
    return SkipPlan.from_bytes(
        share(
            job.control,
            lambda: solve_here(job, placement, costs, scores, index, step, same_rows=same_rows).to_bytes(),
            "the plan",
        )
    )


def meets_every_block(engine: EngineConfig) -> bool:
    """Whether replicas wait for each other in every block, as under ZeRO 3 and FSDP2, which gather its weights."""
    return engine.data_parallel in ("zero3", "fsdp2")


def batches_of(job: Job, micro_batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Groups what a loader over the job's sampler yields into batches on the job's device, in slot order."""
    on_device = ((images.to(job.device), labels.to(job.device)) for images, labels in micro_batches)
    while batch := list(islice(on_device, job.config.data.slots)):
        yield batch


def solve_here(
    job: Job,
    placement: Placement,
    costs: PlanCosts,
    scores: Scores | None,
    index: int,
    step: int,
    *,
    same_rows: bool = False,
) -> SkipPlan:
    """The plan that the configuration asks for, on this rank alone; arguments as in `make_plan`."""
    config, replicas = job.config.plan, job.layout.replicas
    if config.file is not None:
        return _saved_plan(Path(config.file), job)
    budget = _budget_from(job, step)
    if config.entry.binding == "sample":
        return plan_samples(
            samples=job.config.data.slots * job.config.data.micro_batch_size,
            slots=job.config.data.slots,
            replicas=replicas,
            num_blocks=job.executor.subnets.num_blocks,
            num_heads=job.executor.subnets.num_heads,
            compute_budget=budget,
            score_cost=job.costs.score_flops / job.costs.dense_flops,
        )
    return solve_slots(
        config.model_copy(update={"compute_budget": budget}),
        scores,
        slots=job.config.data.slots,
        replicas=replicas,
        subnets=job.executor.subnets.shape,
        forward_cost=costs.forward_share,
        always_share=costs.always_share,
        trains=job.costs.trains,
        device_speed=by_device(costs.device_speed, job.layout),
        replicas_meet=meets_every_block(job.config.engine),
        seed=(job.config.run.seed, index),
        same_rows=same_rows,
        placement=placement,
        most_full=None if costs.most_full is None else by_device(costs.most_full, job.layout),
        step_time=step_time(job, costs),
        token_layouts=token_layouts(job),
    )


def _budget_from(job: Job, step: int) -> float:
    """Compute budget of a plan whose first step is `step`, until the next one is due."""
    replan, total = job.config.plan.replan, job.total_steps
    if replan.every is None:
        return job.config.plan.compute_budget
    steps = replan.every * (job.sampler.batches_per_epoch if replan.unit == "epochs" else 1)
    return job.config.plan.budget_between(step / total, min(step + steps, total) / total)


def token_layouts(job: Job) -> tuple[TokenLayout, ...]:
    """Those that a plan may have."""
    configured = job.config.engine.token_layout
    family = job.executor.subnets.family
    if configured != "auto":
        return (configured,)
    return layouts_of(family, family.blocks(job.model), family.tokens_between(job.model))


def step_time(job: Job, costs: PlanCosts) -> StepTime:
    """How long a step's subnets and messages take, by what all ranks measured."""
    numbers = job.config.data.micro_batch_size * job.executor.subnets.family.numbers_between(job.model)
    of_subnets = costs.dense_seconds * (1 - costs.always_share)
    return StepTime(
        seconds_per_cost=max(of_subnets / job.costs.num_subnets, 1e-12),
        activation_bytes=numbers * (4 if job.config.engine.precision == "fp32" else 2),
        seconds_per_byte=costs.seconds_per_byte,
        latency=costs.message_latency,
    )


def token_layout_of(plan: SkipPlan, job: Job, placement: Placement, costs: PlanCosts) -> TokenLayout:
    """The layout in which a plan runs: the same on every rank and in a resumed run, from what all have in common."""
    allowed = token_layouts(job)
    if len(allowed) == 1 or plan.binding == "sample":
        return allowed[0]
    config, equal = job.config.plan, np.ones(plan.operations.shape)
    problem = PlanProblem.parallel(
        equal,
        equal,
        replicas=plan.replicas,
        rank=placement.owner,
        stage=placement.stage,
        compute_budget=1.0,
        communication_budget=config.communication_budget,
        messages=config.messages,
        forward_cost=costs.forward_share,
        device_speed=by_device(costs.device_speed, job.layout),
        replicas_meet=meets_every_block(job.config.engine),
    )
    if (problem.used_communication(plan) > problem.budgets(BUDGET_EPSILON)[:, 1]).any():
        allowed = _that_send_no_more("sharded", allowed)  # for which the plan was made
    return step_time(job, costs).fastest(plan, problem, allowed)[1]


def _that_send_no_more(than: TokenLayout, layouts: Sequence[TokenLayout]) -> tuple[TokenLayout, ...]:
    """Of these layouts, those in which no plan sends more than in another."""
    return tuple(layout for layout in layouts if than == "replicated" or layout != "replicated")


def by_device(of_ranks: Sequence[float], layout: Layout) -> list[float]:
    """The ranks' values in the order of a problem's devices: replica, stage, tensor-parallel rank."""
    return [
        of_ranks[layout.rank_of(stage=stage, replica=replica, tensor_rank=tensor_rank)]
        for replica in range(layout.replicas)
        for stage in range(layout.stages)
        for tensor_rank in range(layout.tensor_ranks)
    ]


def solve_slots(
    config: PlanConfig,
    scores: Scores | None,
    *,
    slots: int,
    replicas: int,
    subnets: tuple[int, int],
    forward_cost: float,
    always_share: float,
    trains: npt.NDArray[np.bool_] | None = None,
    device_speed: Sequence[float] | None,
    replicas_meet: bool,
    seed: tuple[int, int],
    same_rows: bool,
    placement: Placement | None = None,
    most_full: Sequence[float] | None = None,
    step_time: StepTime | None = None,
    token_layouts: Sequence[TokenLayout] = ("replicated",),
) -> SkipPlan:
    """The plan by micro-batches that `config` asks for; costs, speeds and `replicas_meet` as PlanProblem takes them.

    subnets: (blocks, heads). trains: bool [block], blocks that plans have a say in; all others, which are frozen, run
    FULL, as part of what always runs; None: all.
    same_rows: one replica's plan, by the scores' mean over the replicas, for all of them.
    placement: where a replica's subnets are; None: all on one rank.
    most_full: as PlanProblem takes it. token_layouts: those that the plan may have; if what it sends depends on them,
    the faster of their plans is taken.

    Raises PlanError where no plan keeps the budgets, also because frozen blocks leave nothing to plan.
    """
    assert config.entry.binding == "slot", "that plan is of another kind"
    if not config.entry.keeps_budgets:
        return SkipPlan.dense(slots, replicas, *subnets)
    posed_replicas = 1 if same_rows else replicas
    planned = np.ones(subnets[0], dtype=bool) if trains is None else trains
    _check_frozen(planned, placement)

    def posed(values: np.ndarray) -> np.ndarray:
        by_copy = values.astype(np.float64).reshape(slots, -1, posed_replicas, *subnets)
        mean: np.ndarray = by_copy.mean(axis=1).reshape(-1, *subnets)
        return mean[:, planned]

    equal = np.ones((slots * replicas, *subnets))
    depth = np.flatnonzero(planned)[:, None] / subnets[0] + 1 / subnets[0]  # [block, 1]

    def pose(token_layout: TokenLayout) -> PlanProblem:
        return PlanProblem.parallel(
            posed(equal if scores is None else scores.forward),
            posed(equal if scores is None else scores.backward) * depth**config.depth_exponent,
            replicas=posed_replicas,
            rank=None if placement is None else placement.owner[planned],
            stage=None if placement is None else placement.stage[planned],
            compute_budget=config.compute_budget,
            communication_budget=config.communication_budget,
            memory_budget=config.memory_budget,
            forward_cost=forward_cost,
            always_share=always_share,
            device_speed=None if same_rows else device_speed,
            most_full=[min(most_full)] if same_rows and most_full is not None else most_full,
            messages=config.messages,
            replicas_meet=replicas_meet and not same_rows,
            token_layout=token_layout,
        )

    problems = [
        pose(layout)
        for layout in token_layouts
        if not (layout == "overlapped" and "sharded" in token_layouts)
    ]  # which sends the same
    if config.messages == "by_head" or config.communication_budget is None:
        problems = problems[:1]  # the layout changes nothing for the planner
    plans = [solve(problem, config.planner, **config.arguments(seed=seed)) for problem in problems]
    plan = plans[0]
    if len(plans) > 1:
        assert step_time is not None
        seconds = [
            step_time.fastest(each, problem, _that_send_no_more(problem.token_layout, token_layouts))[0]
            for each, problem in zip(plans, problems, strict=True)
        ]
        plan = plans[int(np.argmin(seconds))]
    plan = plan.among(planned)
    copies = replicas // posed_replicas
    return replace(
        plan,
        operations=plan.operations.repeat(copies, axis=0),
        replicas=replicas,
        objective=plan.objective * copies,
        bound=plan.bound * copies,
    )


def _check_frozen(planned: npt.NDArray[np.bool_], placement: Placement | None) -> None:
    """Raises PlanError where frozen blocks leave nothing to plan, on all ranks or on one of them."""
    frozen = np.flatnonzero(~planned).tolist()
    if not planned.any():
        raise PlanError(
            "every block is frozen, so that no skip would spare a weight gradient: plan.planner=dense, or let some "
            "blocks train"
        )
    for stage, blocks in enumerate([] if placement is None else placement.stages):
        if not planned[list(blocks)].any():
            raise PlanError(
                f"blocks {frozen} are frozen, which is all that pipeline stage {stage} has: no plan can share out the "
                f"budget; use fewer stages, or none"
            )


def _saved_plan(path: Path, job: Job) -> SkipPlan:
    plan = SkipPlan.load(path)
    if plan.operations.shape != job.plan_shape:
        raise PlanError(
            f"plan.file={path} has {plan.operations.shape} rows, blocks and heads, but this run {job.plan_shape}: "
            "score and plan with the same model, data.slots and number of ranks"
        )
    return replace(plan, replicas=job.sampler.replicas)


def rows_of_all(control: Control, own: Tensor, layout: Layout | None = None) -> np.ndarray:
    """[row, block, head] of all replicas from each replica's own [slot, block, head].

    layout: which ranks speak for their replicas; None: each is one.
    """
    of_slots = own.cpu().numpy().astype("<f4")
    layout = layout or Layout.of(control.world_size, control.rank)
    packed = control.all_gather(of_slots.tobytes() if layout.leads_replica else b"")
    leaders = [layout.rank_of(replica=replica) for replica in range(layout.replicas)]
    parts = [np.frombuffer(packed[rank], "<f4").reshape(of_slots.shape) for rank in leaders]
    return np.stack(parts, axis=1).reshape(-1, *of_slots.shape[1:])
