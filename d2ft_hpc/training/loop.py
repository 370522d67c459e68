"""One run from its configuration to its results file: set up, plan, train, evaluate, record."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from d2ft_hpc.config import RunConfig
from d2ft_hpc.data.loader import eval_loader, train_loader
from d2ft_hpc.engines.build import build_engine
from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.metering.times import AllReduceSeconds, measure_all_reduce
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.training.checkpoint import Position, load_checkpoint, newest_checkpoint, save_checkpoint
from d2ft_hpc.training.environment import describe_environment
from d2ft_hpc.training.evaluate import evaluate
from d2ft_hpc.training.job import Job, set_up
from d2ft_hpc.training.plan_costs import PlanCosts, find_costs
from d2ft_hpc.training.plans import Scores, batches_of, is_due, make_plan, measure_scores, solve_here
from d2ft_hpc.training.progress import Progress
from d2ft_hpc.training.records import StepRecorder
from d2ft_hpc.training.replanning import Replanner
from d2ft_hpc.training.steps import StepRunner

RESULTS = "results.h5"
MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"


def train(config: RunConfig, control: Control, device: torch.device, launcher: str) -> Path:
    """Runs the whole job on this rank, together with all others, and returns the path of the results file.

    launcher: what started the ranks, for the records.
    """
    with agreed(control, "set-up"):
        job = set_up(config, control, device)
    costs = find_costs(job)
    engine = build_engine(config, job.model, job.executor, job.total_steps, _loss)
    all_reduce = measure_all_reduce(device)
    position = Position()
    if config.train.resume:
        position = _resume(job, engine)
    with ExitStack() as stack:
        writer = None
        with agreed(control, "opening the results file"):
            if control.rank == 0:
                writer = stack.enter_context(_open_results(job, costs, all_reduce, launcher, position))
        _train_epochs(job, costs, engine, writer, position)
    with agreed(control, "saving the model"):
        if control.rank == 0:
            weights = {name: tensor.contiguous() for name, tensor in job.model.state_dict().items()}
            save_file(weights, config.run_folder / MODEL)
    return config.run_folder / RESULTS


def _train_epochs(
    job: Job, costs: PlanCosts, engine: Engine, writer: ResultsWriter | None, position: Position
) -> None:
    config, control = job.config, job.control
    progress = Progress(control.rank, job.total_steps)
    recorder = StepRecorder(control, writer)
    runner = StepRunner(job, engine)
    replanner = Replanner(control)
    if position.steps_done == 0:
        _evaluate(job, writer, progress, position)
    loader = train_loader(job.train_set, job.sampler, num_workers=config.data.workers)
    for epoch in range(position.epochs_done, config.train.epochs):
        job.sampler.set_epoch(epoch)
        batches = batches_of(job, loader)
        for step_of_epoch in range(job.sampler.batches_per_epoch):
            if is_due(config.plan, epoch=epoch, step_of_epoch=step_of_epoch, steps_done=position.steps_done):
                position = _replan(job, costs, writer, progress, position, replanner)
            position = _take_over(job, writer, progress, position, replanner)
            start = time.perf_counter()
            micro_batches = next(batches)
            record = runner.run(
                micro_batches,
                step=position.steps_done,
                epoch=epoch,
                plan=position.plans_made - 1,
                data_seconds=time.perf_counter() - start,
            )
            recorder.add(record)
            position = replace(position, steps_done=position.steps_done + 1)
            share = record.of_rank["planned_flops"] / record.of_rank["dense_flops"]
            progress.step(epoch + 1, position.steps_done, record.of_rank["loss"], record.learning_rate, share)
        position = replace(position, epochs_done=epoch + 1)
        recorder.gather()
        if (
            position.epochs_done % config.train.evaluate_every_epochs == 0
            or position.epochs_done == config.train.epochs
        ):
            _evaluate(job, writer, progress, position)
        every = config.train.checkpoint_every_epochs
        if every is not None and position.epochs_done % every == 0:
            position = _take_over(job, writer, progress, position, replanner, wait=True)
            assert job.executor.plan is not None
            saved = save_checkpoint(
                config.run_folder / CHECKPOINTS, engine, job.executor.plan, position, control
            )
            _note(writer, position, "checkpoint", str(saved.name))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def _resume(job: Job, engine: Engine) -> Position:
    with agreed(job.control, "looking for a checkpoint"):
        checkpoint = newest_checkpoint(job.config.run_folder / CHECKPOINTS)
    plan, position = load_checkpoint(checkpoint, engine, job.control)
    job.executor.load(plan, job.control.rank)
    return position


def _replan(
    job: Job,
    costs: PlanCosts,
    writer: ResultsWriter | None,
    progress: Progress,
    position: Position,
    replanner: Replanner,
) -> Position:
    """Makes the next plan and puts it in force; or begins with it, if it may come while training goes on."""
    start = time.perf_counter()
    if job.config.plan.replan.overlap and position.plans_made > 0:
        if replanner.is_under_way:
            _note(writer, position, "replan", "skipped: the plan before is still being solved")
            return position
        scores = measure_scores(job, _loss)
        replanner.start(partial(solve_here, job, costs, scores))
        if scores is not None and writer is not None:
            _record_scores(writer, scores, position)
        _note(writer, position, "replan", "scores measured, solving begins", time.perf_counter() - start)
        return position
    scores = measure_scores(job, _loss)
    plan = make_plan(job, costs, scores)
    if scores is not None and writer is not None:
        _record_scores(writer, scores, position)
    return _put_in_force(job, writer, progress, position, plan, time.perf_counter() - start)


def _take_over(
    job: Job,
    writer: ResultsWriter | None,
    progress: Progress,
    position: Position,
    replanner: Replanner,
    *,
    wait: bool = False,
) -> Position:
    """Puts a plan in force that was solved meanwhile."""
    made = replanner.at_boundary(wait=wait)
    if made is None:
        return position
    if made.plan is None:
        progress.say(f"no new plan, the old one stays: {made.fault}")
        _note(writer, position, "replan", f"failed: {made.fault}", made.seconds)
        return position
    return _put_in_force(job, writer, progress, position, made.plan, made.seconds)


def _put_in_force(
    job: Job,
    writer: ResultsWriter | None,
    progress: Progress,
    position: Position,
    plan: SkipPlan,
    seconds: float,
) -> Position:
    job.executor.load(plan, job.control.rank)
    planned = job.costs.planned_share(plan)
    progress.say(
        f"plan {position.plans_made} ({plan.planner}, {plan.status}, gap {plan.gap:.1e}): {planned:.1%} of the dense "
        f"compute, made in {seconds:.2f} s"
    )
    if writer is not None:
        _record_plan(writer, plan, planned, position, seconds)
    return replace(position, plans_made=position.plans_made + 1)


def _evaluate(job: Job, writer: ResultsWriter | None, progress: Progress, position: Position) -> None:
    batches = eval_loader(
        job.test_set,
        batch_size=4 * job.config.data.micro_batch_size,
        replicas=job.control.world_size,
        replica=job.control.rank,
    )
    result = evaluate(job.model, batches, job.control, job.device)
    progress.say(
        f"evaluation after {position.epochs_done} epochs: accuracy {result.accuracy:.2%}, loss {result.loss:.4f} "
        f"({result.samples} images, {result.seconds:.1f} s)"
    )
    if writer is not None:
        writer.append(
            "evaluations",
            {
                "step": position.steps_done,
                "epoch": position.epochs_done,
                "accuracy": result.accuracy,
                "loss": result.loss,
                "samples": result.samples,
                "seconds": result.seconds,
            },
        )


def _open_results(
    job: Job, costs: PlanCosts, all_reduce: AllReduceSeconds, launcher: str, position: Position
) -> ResultsWriter:
    path, flush_seconds = job.config.run_folder / RESULTS, job.config.results.flush_seconds
    if job.config.train.resume:
        writer = ResultsWriter.resume(path, last_step=position.steps_done - 1, flush_seconds=flush_seconds)
        _note(writer, position, "resume", f"after epoch {position.epochs_done}")
        return writer
    writer = ResultsWriter(path, flush_seconds=flush_seconds)
    writer.put("config", {"yaml": job.config.to_yaml()})
    writer.put("environment", {}, describe_environment(job.control, launcher, job.device))
    writer.put(
        "model",
        {},
        {
            "name": job.config.model.name,
            "num_blocks": job.executor.subnets.num_blocks,
            "num_heads": job.executor.subnets.num_heads,
            "always_flops": job.costs.always_flops,
            "full_flops": job.costs.full_flops,
            "forward_only_flops": job.costs.forward_only_flops,
            "plan_costs": json.dumps(asdict(costs)),
            "all_reduce_seconds": all_reduce.latency,
            "all_reduce_seconds_per_byte": all_reduce.per_byte,
        },
    )
    return writer


def _record_scores(writer: ResultsWriter, scores: Scores, position: Position) -> None:
    """Of the plan that is made next."""
    writer.put(
        f"scores/{position.plans_made}",
        {"forward": scores.forward, "backward": scores.backward},
        {"step": position.steps_done, "seconds": scores.seconds},
    )


def _record_plan(
    writer: ResultsWriter, plan: SkipPlan, planned_share: float, position: Position, seconds: float
) -> None:
    writer.put(
        f"plans/{position.plans_made}",
        {"operations": plan.operations},
        {
            "hash": plan.hash,
            "planner": plan.planner,
            "replicas": plan.replicas,
            "objective": plan.objective,
            "bound": plan.bound,
            "gap": plan.gap,
            "status": plan.status,
            "solve_seconds": plan.solve_seconds,
            "first_step": position.steps_done,
            "planned_compute": planned_share,
        },
    )
    _note(writer, position, "plan", plan.hash, seconds)


def _note(
    writer: ResultsWriter | None, position: Position, kind: str, text: str, seconds: float = 0.0
) -> None:
    if writer is not None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        writer.append(
            "events",
            {"step": position.steps_done, "time": now, "kind": kind, "text": text, "seconds": seconds},
        )
