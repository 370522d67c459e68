"""One run from its configuration to its results file: set up, plan, train, evaluate, record."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

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
from d2ft_hpc.launch.cores import share_of_cores
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.lifecycle import PlanController, PlanState
from d2ft_hpc.lifecycle.foresight import foresee_plans, price_of
from d2ft_hpc.model.lora import save_adapter, timm_state
from d2ft_hpc.parallel.stages import describe_stages
from d2ft_hpc.recording.provenance import describe_environment
from d2ft_hpc.recording.step_recorder import StepRecorder
from d2ft_hpc.safe_text import say
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.between_steps import BetweenSteps
from d2ft_hpc.training.checkpoint import Position, restore_checkpoint
from d2ft_hpc.training.evaluate import evaluate
from d2ft_hpc.training.finite import require_finite, with_advice
from d2ft_hpc.training.free_memory import describe_memory, with_memory_limits
from d2ft_hpc.training.job import Job, layout_of, set_up
from d2ft_hpc.training.measurements import Measurements, measure_job
from d2ft_hpc.training.model_placement import place
from d2ft_hpc.training.plan_context import compute_in_words, is_due, plan_context
from d2ft_hpc.training.probe_scores import ProbeScores
from d2ft_hpc.training.progress import WORTH_TELLING, Progress
from d2ft_hpc.training.results_file import first_plan_of, open_own_results, open_results
from d2ft_hpc.training.resume import (
    check_length,
    check_position,
    choose_start,
    fitted_to_ranks,
    in_cut_epoch,
    to_train_further,
)
from d2ft_hpc.training.run_log import RunLog
from d2ft_hpc.training.saver import CheckpointSaver
from d2ft_hpc.training.speed_watch import SpeedWatch
from d2ft_hpc.training.step_runner import StepRunner
from d2ft_hpc.training.tensorboard import TensorBoard
from d2ft_hpc.training.trace import StepTrace


@dataclass(frozen=True, eq=False)
class _Run:
    """A run on this rank, set up."""

    job: Job
    engine: Engine
    measured: Measurements
    plans: PlanController
    log: RunLog


def train(config: RunConfig, control: Control, device: torch.device, launcher: str, watch: Watch) -> bool:
    """Runs the whole job on this rank, together with all others; false if a signal stopped it and it can go on.

    launcher: what started the ranks, for the records.
    Raises DivergedError on all ranks if its loss or its weights stop being finite.
    """
    start = choose_start(config, control)
    if start.finished:
        if control.rank == 0:
            further = to_train_further(config)
            say(f"{config.run_folder} is finished: nothing is left to do; to train further, {further}")
        return True
    watch.enter("set-up")
    cores = share_of_cores(control)
    with agreed(control, "set-up"):
        replicas = layout_of(config, control).replicas
        job = set_up(fitted_to_ranks(config, start.position, replicas), control, device, cores)
        check_position(job, start)
        check_length(job, start)
        start = in_cut_epoch(job, start)
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
    costs = with_memory_limits(job, engine, placement, measured.kept, measured.plan_costs)
    measured = replace(measured, plan_costs=costs)
    if control.rank == 0 and measured.kept is not None:
        print(describe_memory(costs, measured.kept, job.costs.num_subnets), flush=True)
    log = RunLog(job, engine.executor, Progress(control.rank, job.total_steps, job.sampler.batch_size), watch)
    with agreed(control, "planning"):
        context = plan_context(job, placement, costs)
    source = ProbeScores(job, engine, watch)
    run = _Run(job, engine, measured, PlanController(context, engine, control, source, log), log)
    if start.checkpoint is not None:
        watch.enter("loading the checkpoint")
        plan = restore_checkpoint(start.checkpoint, engine, control)
        plan = replace(plan, replicas=job.sampler.replicas)
        run.plans.restore(PlanState(plan, plans_made=start.position.plans_made))
    if start.checkpoint is None or job.config.plan.replan.every is not None:
        watch.enter("looking for a plan", allowed_seconds=2 * job.config.plan.time_limit_seconds)
        plan = foresee_plans(run.plans)
    if control.rank == 0 and (price := price_of(plan)):
        print_line(f"d2ft-hpc: warning: {price}")
    if control.rank == 0 and config.steps_share < 1:
        print(f"the run takes {compute_in_words(job, plan)}", flush=True)
    watch.enter("opening the run's folder")
    with ExitStack() as stack, with_advice(config):
        own_writer, first_plan = None, 0
        with agreed(control, "opening the run's folder"):
            if control.rank == 0:
                environment = describe_environment(control, job.layout, launcher, device)
                log.writer = stack.enter_context(open_results(job, environment, measured, start))
                first_plan = first_plan_of(log.writer, job, engine.executor, start)
                source_name = str(start.checkpoint or "the beginning")
                run_folder.record_launch(config, control, environment, source_name)
                if config.results.tensorboard:
                    folder = config.run_folder / run_folder.TENSORBOARD
                    log.tensorboard = stack.enter_context(closing(TensorBoard(folder)))
            if config.results.file_per_rank:
                own_writer = stack.enter_context(open_own_results(job, start))
            run_folder.open_log(config.run_folder, control.rank)
        on_step = None if log.tensorboard is None else log.tensorboard.step
        recorder = stack.enter_context(
            StepRecorder(control, log.writer, own_writer, on_step, first_plan=first_plan)
        )
        finished = _train_epochs(run, recorder, start.position, config.to_yaml())
        watch.enter("saving the model")
        recorder.finish()
        with engine.full_model() as model, agreed(control, "saving the model"):
            if control.rank == 0 and finished:
                _save_model(job, model)
        watch.enter("closing the results")
        for opened in (log.writer, own_writer):
            if opened is not None:
                opened.close(complete=finished)
    return finished


def _train_epochs(run: _Run, recorder: StepRecorder, position: Position, config_text: str) -> bool:
    """Returns False if the run was stopped and saved before its end. config_text: the configuration as the user gave
    it, for checkpoints."""
    job, engine, plans, log = run.job, run.engine, run.plans, run.log
    config, control = job.config, job.control
    speed_watch = SpeedWatch(control)
    runner = StepRunner(job, engine, plans.context)
    trace = StepTrace(config.train.traced, config.run_folder / "traces" / f"rank-{control.rank}.json")
    start_step, plans_made = position.steps_done, position.plans_made
    if position.steps_done == 0 and config.train.evaluate_at_start:
        _evaluate(run, position)

    def settle(position: Position) -> Position:
        """The plans' state as a checkpoint holds it, after waiting for a plan that is still being solved."""
        plans.settle(position.steps_done)
        return replace(position, plans_made=plans.plans_made)

    folder = config.run_folder / run_folder.CHECKPOINTS
    with CheckpointSaver(folder, control, config=config_text) as saver, closing(trace):
        saver.newest_step = position.steps_done
        between = BetweenSteps(job, engine, saver, recorder, log, settle)
        position = replace(position, rows=job.sampler.rows, ranks=control.world_size)
        for epoch in range(position.epochs_done, job.num_epochs):
            job.sampler.set_epoch(epoch, start_batch=position.batches_done)
            batches = job.batches(job.train_batches)
            for step_of_epoch in range(position.batches_done, job.steps_of_epoch(epoch)):
                position, goes_on = between.cross(position)
                if not goes_on:
                    return False
                step = position.steps_done
                due = is_due(config.plan, epoch=epoch, step_of_epoch=step_of_epoch, steps_done=step)
                if due and config.plan.replan.speeds == "watched" and plans.plans_made > 0:
                    costs = plans.context.reckoned
                    speeds = speed_watch.speeds(costs.device_speed)
                    plans.context = replace(plans.context, reckoned=replace(costs, device_speed=speeds))
                    log.note(step, "speeds", ", ".join(f"{speed:.2f}" for speed in speeds))
                plans.before_batch(step, due=due)
                if plans.plans_made != plans_made:
                    plans_made = plans.plans_made
                    speed_watch.begin_plan()
                with trace.step(step + 1):
                    record = runner.run(batches, step=step, epoch=epoch, plan=plans_made - 1)
                recorder.add(record)
                speed_watch.add(record.of_rank["executed_flops"], record.times)
                position = replace(position.after_step(), plans_made=plans.plans_made)
                share = record.of_rank["planned_flops"] / record.of_rank["dense_flops"]
                passes = run.measured.profile.ideal_seconds(share, job.costs, job.share_of_tokens(step))
                if log.progress.is_due(position.steps_done, config.data.slots * passes):
                    record.times.wait()
                    loss, rate = float(record.loss), record.learning_rate
                    waited = recorder.share_of_waiting_for_data
                    log.progress.step(epoch + 1, position.steps_done, loss, rate, share, waited)
            position = position.after_epoch()
            every = config.train.evaluate_every_epochs
            if position.epochs_done % every == 0 or position.epochs_done == job.num_epochs:
                _evaluate(run, position)
        between.end(position)
    if (waited := recorder.share_of_waiting_for_data) >= WORTH_TELLING:
        log.say(
            f"{waited:.0%} of the steps' time was spent waiting for images: raise data.workers (each rank had "
            f"{job.data_workers}) or pack them as pixels; d2ft-hpc bench data tells how fast they come"
        )
    per_step = engine.executor.lookup_seconds / max(position.steps_done - start_step, 1)
    log.say(f"following the plan took {1e6 * per_step:.0f} us a step, beside the blocks' own work")
    return True


def _evaluate(run: _Run, position: Position) -> None:
    run.log.enter("evaluation")
    with run.engine.full_model() as model:
        job, watch = run.job, run.log.watch
        result = evaluate(model, watch.along(job.evaluation_batches), job.control, job.device)
    run.log.evaluated(position, result)


def _save_model(job: Job, model: nn.Module) -> None:
    """Writes the trained model. Raises CheckpointError if it cannot be written, DivergedError if its weights are not
    finite; an older model then stays."""
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
            f"{path}: the trained model cannot be written: {error}; make room, and start again with train.resume=auto"
        ) from error
