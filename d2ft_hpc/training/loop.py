"""One run from its configuration to its results file: set up, plan, train, evaluate, record."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from d2ft_hpc.config import RunConfig
from d2ft_hpc.engines.build import build_engine
from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.files import atomic
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.model.lora import save_adapter, timm_state
from d2ft_hpc.parallel.layout import Placement
from d2ft_hpc.parallel.stages import describe_stages
from d2ft_hpc.parallel.tensor import TensorParallelExecutor
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.messages import TokenLayout
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.safe_text import say
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.board import Board
from d2ft_hpc.training.boundary import StepBoundary
from d2ft_hpc.training.checkpoint import Position, load_checkpoint
from d2ft_hpc.training.environment import describe_environment
from d2ft_hpc.training.evaluate import evaluate
from d2ft_hpc.training.finite import require_finite, with_advice
from d2ft_hpc.training.foresight import foresee_plans
from d2ft_hpc.training.job import Job, layout_of, set_up
from d2ft_hpc.training.measured import Measured, measure_job
from d2ft_hpc.training.placing import place
from d2ft_hpc.training.plan_costs import PlanCosts
from d2ft_hpc.training.plans import (
    batches_of,
    is_due,
    make_plan,
    measure_scores,
    solve_here,
    token_layout_of,
)
from d2ft_hpc.training.progress import Progress
from d2ft_hpc.training.record import first_plan_of, open_own_results, open_results
from d2ft_hpc.training.recorded import note, record_plan, record_scores
from d2ft_hpc.training.records import StepRecorder
from d2ft_hpc.training.replanning import Replanner
from d2ft_hpc.training.resume import check_length, check_position, choose_start, fitted_to_ranks
from d2ft_hpc.training.room import describe_room, with_room
from d2ft_hpc.training.saver import CheckpointSaver
from d2ft_hpc.training.speed_watch import SpeedWatch
from d2ft_hpc.training.steps import StepRunner

CONFUSION_CLASSES = 256
"""With more classes, evaluations record the accuracy of each class but no confusion."""


def train(config: RunConfig, control: Control, device: torch.device, launcher: str, watch: Watch) -> bool:
    """Runs the whole job on this rank, together with all others; false if a signal stopped it and it can go on.

    launcher: what started the ranks, for the records.
    Raises DivergedError on all ranks if its loss or its weights stop being finite.
    """
    start = choose_start(config, control)
    if start.finished:
        if control.rank == 0:
            say(f"{config.run_folder} is finished: nothing is left to do")
        return True
    watch.enter("set-up")
    with agreed(control, "set-up"):
        replicas = layout_of(config, control).replicas
        job = set_up(fitted_to_ranks(config, start.position, replicas), control, device)
        check_position(job, start)
        check_length(job, start)
    if control.rank == 0:
        for remark in job.remarks:
            print_line(f"d2ft-hpc: warning: {remark}")
    watch.enter("measuring the model")
    measured = measure_job(job)  # before the engine, which may spread the weights over ranks
    placement = place(job, start.checkpoint, watch)
    if control.rank == 0 and placement.layout.stages > 1:
        print(describe_stages(job.layer_flops, placement.stages), flush=True)
    watch.enter("building the engine")
    engine = build_engine(job.config, job.model, job.executor, placement, job.total_steps, job.loss, control)
    costs = with_room(job, engine, placement, measured.kept, measured.plan_costs)
    measured = replace(measured, plan_costs=costs)
    if control.rank == 0 and measured.kept is not None:
        print(describe_room(costs, measured.kept, job.costs.num_subnets), flush=True)
    if start.checkpoint is not None:
        watch.enter("loading the checkpoint")
        plan = load_checkpoint(start.checkpoint, engine, control)
        plan = replace(plan, replicas=job.sampler.replicas)
        _follow(job, engine, placement, measured.plan_costs, plan)
    if start.checkpoint is None or job.config.plan.replan.every is not None:
        watch.enter("looking for a plan", allowed_seconds=2 * job.config.plan.time_limit_seconds)
        foresee_plans(job, placement, costs, engine)
    watch.enter("opening the run's folder")
    with ExitStack() as stack, with_advice(config):
        writer, own_writer, board, first_plan = None, None, None, 0
        with agreed(control, "opening the run's folder"):
            if control.rank == 0:
                environment = describe_environment(control, job.layout, launcher, device)
                writer = stack.enter_context(open_results(job, environment, measured, start))
                first_plan = first_plan_of(writer, job, engine.executor, start)
                source = str(start.checkpoint or "the beginning")
                run_folder.record_launch(config, control, environment, source)
                if config.results.tensorboard:
                    board = stack.enter_context(closing(Board(config.run_folder / run_folder.TENSORBOARD)))
            if config.results.file_per_rank:
                own_writer = stack.enter_context(open_own_results(job, start))
            run_folder.open_log(config.run_folder, control.rank)
        recorder = stack.enter_context(
            StepRecorder(control, writer, own_writer, board, first_plan=first_plan)
        )
        finished = _train_epochs(
            job, engine, placement, writer, recorder, board, measured, start.position, watch, config.to_yaml()
        )
        watch.enter("saving the model")
        recorder.finish()
        with engine.full_model() as model, agreed(control, "saving the model"):
            if control.rank == 0 and finished:
                _save_model(job, model)
        watch.enter("closing the results")
        for opened in (writer, own_writer):
            if opened is not None:
                opened.close(complete=finished)
    return finished


def _train_epochs(
    job: Job,
    engine: Engine,
    placement: Placement,
    writer: ResultsWriter | None,
    recorder: StepRecorder,
    board: Board | None,
    measured: Measured,
    position: Position,
    watch: Watch,
    config_text: str,
) -> bool:
    """False if it was stopped and saved before the end. config_text: as the user gave it, for checkpoints."""
    config, control = job.config, job.control
    costs, speed_watch = measured.plan_costs, SpeedWatch(control)
    progress = Progress(control.rank, job.total_steps)
    runner = StepRunner(job, engine, placement)
    start_step, plans_made = position.steps_done, position.plans_made
    replanner = Replanner(control)
    if position.steps_done == 0 and config.train.evaluate_at_start:
        _evaluate(job, engine, writer, board, progress, position, watch)

    def settle(position: Position) -> Position:
        """No plan is under way any more: a checkpoint holds the one in force."""
        return _take_over(job, engine, placement, costs, writer, progress, position, replanner, wait=True)

    folder = config.run_folder / run_folder.CHECKPOINTS
    keep = config.train.keep_checkpoints
    with CheckpointSaver(folder, control, keep=keep, config=config_text) as saver:
        saver.newest_step = position.steps_done
        boundary = StepBoundary(job, engine, saver, recorder, writer, progress, watch, settle)
        position = replace(position, rows=job.sampler.rows, ranks=control.world_size)
        for epoch in range(position.epochs_done, job.num_epochs):
            job.sampler.set_epoch(epoch, start_batch=position.batches_done)
            batches = batches_of(job, job.train_batches)
            for step_of_epoch in range(position.batches_done, job.steps_of_epoch(epoch)):
                position, goes_on = boundary.cross(position)
                if not goes_on:
                    return False
                steps_done = position.steps_done
                if is_due(config.plan, epoch=epoch, step_of_epoch=step_of_epoch, steps_done=steps_done):
                    if config.plan.replan.speeds == "watched" and position.plans_made > 0:
                        costs = replace(costs, device_speed=speed_watch.speeds(costs.device_speed))
                        speeds = ", ".join(f"{speed:.2f}" for speed in costs.device_speed)
                        note(writer, steps_done, "speeds", speeds)
                    position = _replan(
                        job,
                        engine,
                        placement,
                        costs,
                        writer,
                        progress,
                        position,
                        replanner,
                        watch,
                    )
                position = _take_over(job, engine, placement, costs, writer, progress, position, replanner)
                if position.plans_made != plans_made:
                    plans_made = position.plans_made
                    speed_watch.begin_plan()
                record = runner.run(batches, step=steps_done, epoch=epoch, plan=position.plans_made - 1)
                recorder.add(record)
                speed_watch.add(record.of_rank["executed_flops"], record.times)
                position = position.after_step()
                if progress.is_due(position.steps_done):
                    share = record.of_rank["planned_flops"] / record.of_rank["dense_flops"]
                    ideal = config.data.slots * measured.profile.ideal_seconds(share, job.costs)
                    loss = float(record.loss)
                    progress.step(epoch + 1, position.steps_done, loss, record.learning_rate, share, ideal)
            position = position.after_epoch()
            if (
                position.epochs_done % config.train.evaluate_every_epochs == 0
                or position.epochs_done == job.num_epochs
            ):
                _evaluate(job, engine, writer, board, progress, position, watch)
        boundary.end(position)
    per_step = engine.executor.lookup_seconds / max(position.steps_done - start_step, 1)
    progress.say(f"following the plan took {1e6 * per_step:.0f} us a step, beside the blocks' own work")
    return True


def _replan(
    job: Job,
    engine: Engine,
    placement: Placement,
    costs: PlanCosts,
    writer: ResultsWriter | None,
    progress: Progress,
    position: Position,
    replanner: Replanner,
    watch: Watch,
    *,
    may_overlap: bool = True,
) -> Position:
    """Makes the next plan and puts it in force; or begins with it, if it may come while training goes on."""
    start = time.perf_counter()
    overlaps = may_overlap and job.config.plan.replan.overlap and position.plans_made > 0
    if overlaps and replanner.is_under_way:
        note(writer, position.steps_done, "replan", "skipped: the plan before is still being solved")
        return position
    watch.enter("scoring")
    with engine.full_model() as model:
        scores = measure_scores(job, model, job.loss, watch)
    watch.enter("planning", allowed_seconds=job.config.plan.time_limit_seconds)
    if scores is not None and writer is not None:
        record_scores(writer, scores, position.steps_done)
    same_rows = engine.same_rows is not None
    if overlaps:
        replanner.start(
            partial(
                solve_here,
                job,
                placement,
                costs,
                scores,
                position.plans_made,
                position.steps_done,
                same_rows=same_rows,
            )
        )
        note(
            writer,
            position.steps_done,
            "replan",
            "scores measured, solving begins",
            time.perf_counter() - start,
        )
        return position
    if same_rows and position.plans_made == 0:
        progress.say(f"one plan for all replicas: {engine.same_rows}")
    plan = make_plan(
        job, placement, costs, scores, position.plans_made, position.steps_done, same_rows=same_rows
    )
    return _put_in_force(
        job, engine, placement, costs, writer, progress, position, plan, time.perf_counter() - start
    )


def _take_over(
    job: Job,
    engine: Engine,
    placement: Placement,
    costs: PlanCosts,
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
        note(writer, position.steps_done, "replan", f"failed: {made.fault}", made.seconds)
        return position
    return _put_in_force(job, engine, placement, costs, writer, progress, position, made.plan, made.seconds)


def _follow(
    job: Job, engine: Engine, placement: Placement, costs: PlanCosts, plan: SkipPlan
) -> TokenLayout | None:
    """Loads a plan and returns the layout of tokens in which it runs; None without tensor parallelism."""
    engine.check(plan)
    layout = None
    if isinstance(engine.executor, TensorParallelExecutor):
        layout = token_layout_of(plan, job, placement, costs)
        engine.executor.use(layout)
    engine.executor.load(plan, job.layout.replica)
    return layout


def _put_in_force(
    job: Job,
    engine: Engine,
    placement: Placement,
    costs: PlanCosts,
    writer: ResultsWriter | None,
    progress: Progress,
    position: Position,
    plan: SkipPlan,
    seconds: float,
) -> Position:
    layout = _follow(job, engine, placement, costs, plan)
    planned = job.costs.planned_share(plan)
    progress.say(
        f"plan {position.plans_made} ({plan.evidence}): {planned:.1%} of the dense "
        f"compute, made in {seconds:.2f} s{'' if layout is None else f', tokens {layout}'}"
    )
    if writer is not None:
        record_plan(job, engine.executor, writer, plan, position.steps_done, seconds)
    return replace(position, plans_made=position.plans_made + 1)


def _evaluate(
    job: Job,
    engine: Engine,
    writer: ResultsWriter | None,
    board: Board | None,
    progress: Progress,
    position: Position,
    watch: Watch,
) -> None:
    watch.enter("evaluation")
    with engine.full_model() as model:
        result = evaluate(model, watch.along(job.evaluation_batches), job.control, job.device)
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


def _save_model(job: Job, model: nn.Module) -> None:
    """Raises CheckpointError where it cannot be written, DivergedError if its weights are not finite; an older model is
    then unharmed."""
    weights = {name: tensor.contiguous() for name, tensor in timm_state(model).items()}
    require_finite(weights)
    path = job.config.run_folder / run_folder.MODEL
    try:
        with atomic.replaced(path) as temporary:
            save_file(weights, temporary)
        if job.config.model.lora is not None:
            save_adapter(model, job.config.run_folder / run_folder.ADAPTER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the trained model cannot be written: {error}; make room, and resume from the last checkpoint"
        ) from error
