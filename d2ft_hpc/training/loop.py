"""One run from its configuration to its results file: set up, plan, train, evaluate, record."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d2ft_hpc.config import RunConfig
from d2ft_hpc.engines.build import build_engine
from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.metering.all_reduce import AllReduceSeconds, measure_all_reduce
from d2ft_hpc.metering.profile import PassProfile, profile_passes
from d2ft_hpc.model.lora import timm_state
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.results.layout import rank_file
from d2ft_hpc.scores import Scores
from d2ft_hpc.training.board import Board
from d2ft_hpc.training.checkpoint import Position, load_checkpoint, newest_checkpoint, save_checkpoint
from d2ft_hpc.training.environment import describe_environment, describe_parameters
from d2ft_hpc.training.evaluate import evaluate
from d2ft_hpc.training.job import Job, set_up
from d2ft_hpc.training.plan_costs import PlanCosts, find_costs
from d2ft_hpc.training.plans import batches_of, is_due, make_plan, measure_scores, solve_here
from d2ft_hpc.training.progress import Progress
from d2ft_hpc.training.records import StepRecorder
from d2ft_hpc.training.replanning import Replanner
from d2ft_hpc.training.steps import StepRunner

RESULTS = "results.h5"
MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"
CONFUSION_CLASSES = 256
"""With more classes, evaluations record the accuracy of each class but no confusion."""


def train(config: RunConfig, control: Control, device: torch.device, launcher: str) -> Path:
    """Runs the whole job on this rank, together with all others, and returns the path of the results file.

    launcher: what started the ranks, for the records.
    """
    with agreed(control, "set-up"):
        job = set_up(config, control, device)
    profile = _profile(job)
    engine = build_engine(config, job.model, job.executor, job.total_steps, job.loss)
    position = Position()
    if config.train.resume:
        position = _resume(job, engine)
    all_reduce = measure_all_reduce(device)
    costs = find_costs(job, profile)
    with ExitStack() as stack:
        writer, own_writer, board = None, None, None
        with agreed(control, "opening the results file"):
            if control.rank == 0:
                writer = stack.enter_context(
                    _open_results(job, launcher, position, profile, costs, all_reduce)
                )
                if config.results.tensorboard:
                    board = stack.enter_context(closing(Board(config.run_folder / "tensorboard")))
            if config.results.file_per_rank:
                own_writer = stack.enter_context(_open_own_results(job, position))
        recorder = stack.enter_context(StepRecorder(control, writer, own_writer, board))
        _train_epochs(job, engine, writer, recorder, board, profile, costs, position)
        with agreed(control, "saving the model"):
            if control.rank == 0:
                weights = {name: tensor.contiguous() for name, tensor in timm_state(job.model).items()}
                save_file(weights, config.run_folder / MODEL)
    return config.run_folder / RESULTS


def _train_epochs(
    job: Job,
    engine: Engine,
    writer: ResultsWriter | None,
    recorder: StepRecorder,
    board: Board | None,
    profile: PassProfile,
    costs: PlanCosts,
    position: Position,
) -> None:
    config, control = job.config, job.control
    progress = Progress(control.rank, job.total_steps)
    runner = StepRunner(job, engine)
    replanner = Replanner(control)
    if position.steps_done == 0 and config.train.evaluate_at_start:
        _evaluate(job, writer, board, progress, position)
    for epoch in range(position.epochs_done, job.num_epochs):
        job.sampler.set_epoch(epoch)
        batches = batches_of(job, job.train_batches)
        for step_of_epoch in range(job.steps_of_epoch(epoch)):
            if is_due(config.plan, epoch=epoch, step_of_epoch=step_of_epoch, steps_done=position.steps_done):
                position = _replan(job, costs, writer, progress, position, replanner)
            position = _take_over(job, writer, progress, position, replanner)
            record = runner.run(batches, step=position.steps_done, epoch=epoch, plan=position.plans_made - 1)
            recorder.add(record)
            position = replace(position, steps_done=position.steps_done + 1)
            if progress.is_due(position.steps_done):
                share = record.of_rank["planned_flops"] / record.of_rank["dense_flops"]
                ideal = config.data.slots * profile.ideal_seconds(share, job.costs)
                loss = float(record.loss)
                progress.step(epoch + 1, position.steps_done, loss, record.learning_rate, share, ideal)
        position = replace(position, epochs_done=epoch + 1)
        if (
            position.epochs_done % config.train.evaluate_every_epochs == 0
            or position.epochs_done == job.num_epochs
        ):
            _evaluate(job, writer, board, progress, position)
        every = config.train.checkpoint_every_epochs
        if every is not None and position.epochs_done % every == 0:
            position = _take_over(job, writer, progress, position, replanner, wait=True)
            assert job.executor.plan is not None
            recorder.finish()  # a resumed run finds every step before its checkpoint
            if writer is not None:
                writer.flush()
            saved = save_checkpoint(
                config.run_folder / CHECKPOINTS, engine, job.executor.plan, position, control
            )
            _note(writer, position, "checkpoint", str(saved.name))


def _profile(job: Job) -> PassProfile:
    data = job.config.data
    shape = (data.micro_batch_size, 3, data.image_size, data.image_size)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return profile_passes(job.model, job.executor, shape, precision[job.config.engine.precision])


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
    overlaps = job.config.plan.replan.overlap and position.plans_made > 0
    if overlaps and replanner.is_under_way:
        _note(writer, position, "replan", "skipped: the plan before is still being solved")
        return position
    scores = measure_scores(job, job.loss)
    if scores is not None and writer is not None:
        _record_scores(writer, scores, position)
    if overlaps:
        replanner.start(partial(solve_here, job, costs, scores, position.plans_made))
        _note(writer, position, "replan", "scores measured, solving begins", time.perf_counter() - start)
        return position
    plan = make_plan(job, costs, scores, position.plans_made)
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
        _record_plan(job, writer, plan, position, seconds)
    return replace(position, plans_made=position.plans_made + 1)


def _evaluate(
    job: Job, writer: ResultsWriter | None, board: Board | None, progress: Progress, position: Position
) -> None:
    result = evaluate(job.model, job.evaluation_batches, job.control, job.device)
    progress.evaluated(result.accuracy, result.seconds)
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
                "class_accuracy": result.class_accuracy,
                **({"confusion": result.confusion} if len(result.confusion) <= CONFUSION_CLASSES else {}),
            },
        )
    if board is not None:
        board.evaluation(position.steps_done, result)


def _open_results(
    job: Job,
    launcher: str,
    position: Position,
    profile: PassProfile,
    costs: PlanCosts,
    all_reduce: AllReduceSeconds,
) -> ResultsWriter:
    path, settings = job.config.run_folder / RESULTS, job.config.results
    options: dict[str, Any] = {
        "flush_seconds": settings.flush_seconds,
        "locking": settings.locking,
        "rank_files": job.control.world_size if settings.file_per_rank else 0,
    }
    if job.config.train.resume:
        writer = ResultsWriter.resume(path, last_step=position.steps_done - 1, **options)
        _note(writer, position, "resume", f"after epoch {position.epochs_done}")
        return writer
    writer = ResultsWriter(path, **options)
    writer.put("config", {"yaml": job.config.to_yaml()})
    writer.put("environment", {}, describe_environment(job.control, launcher, job.device))
    writer.put(
        "model",
        describe_parameters(job.model, job.executor.subnets),
        {
            "name": job.config.model.name,
            "num_blocks": job.executor.subnets.num_blocks,
            "num_heads": job.executor.subnets.num_heads,
            "always_flops": job.costs.always_flops,
            "full_flops": job.costs.full_flops,
            "forward_only_flops": job.costs.forward_only_flops,
            "dense_pass_seconds": profile.dense_seconds,
            "always_pass_seconds": profile.always_seconds,
            "plan_costs": json.dumps(asdict(costs)),
            "all_reduce_seconds": all_reduce.latency,
            "all_reduce_seconds_per_byte": all_reduce.per_byte,
        },
    )
    return writer


def _open_own_results(job: Job, position: Position) -> ResultsWriter:
    """This rank's own file, in runs with a file for each rank."""
    path, settings = rank_file(job.config.run_folder / RESULTS, job.control.rank), job.config.results
    options: dict[str, Any] = {"flush_seconds": settings.flush_seconds, "locking": settings.locking}
    if job.config.train.resume and path.exists():
        return ResultsWriter.resume(path, last_step=position.steps_done - 1, **options)
    return ResultsWriter(path, **options)


def _record_scores(writer: ResultsWriter, scores: Scores, position: Position) -> None:
    """Of the plan that is made next."""
    writer.append(
        "scores",
        {
            "step": position.steps_done,
            "forward": scores.forward,
            "backward": scores.backward,
            "forward_name": scores.forward_name,
            "backward_name": scores.backward_name,
            "seconds": scores.seconds,
            "flops": scores.flops,
            "cached": scores.cached,
        },
    )


def _record_plan(job: Job, writer: ResultsWriter, plan: SkipPlan, position: Position, seconds: float) -> None:
    writer.append(
        "plans",
        {
            "step": position.steps_done,
            "operations": plan.operations,
            "hash": plan.hash,
            "planner": plan.planner,
            "replicas": plan.replicas,
            "binding": plan.binding,
            "objective": plan.objective,
            "bound": plan.bound,
            "gap": plan.gap,
            "status": plan.status,
            "solve_seconds": plan.solve_seconds,
            "planned_compute": job.costs.planned_share(plan),
            "planned_time": max(
                float(job.costs.planned_flops(plan.for_replica(replica)).mean()) / job.costs.dense_flops
                for replica in range(plan.replicas)
            ),
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
