"""Costs and speeds that a run's plans reckon with: counted, measured or the paper's; the same on a resumed run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from d2ft_hpc.config import RunConfig
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.files import atomic
from d2ft_hpc.files.untrusted import read_bytes, read_json
from d2ft_hpc.launch import gathered, share
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.lifecycle.costs import PAPER_FORWARD_COST, PlanCosts, relative_speeds
from d2ft_hpc.metering.all_reduce import AllReduceSeconds
from d2ft_hpc.metering.profile import PassProfile
from d2ft_hpc.planning.communication_volume import ring_bytes
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.run_folder import writing

COSTS = "costs.json"
"""File in the run folder with the costs that a resumed run plans with."""

_MOST_BYTES = 8 << 20


def find_costs(job: Job, profile: PassProfile, all_reduce: AllReduceSeconds) -> PlanCosts:
    """The costs that `plan.costs` and `plan.device_speed` ask for. All ranks call it together and return the same.

    profile, all_reduce: this rank's. An older profile of the same hardware and model takes its place, if the cache
    folder has one, so that runs do not differ by the noise of a measurement. A resumed run takes what it planned with
    before.

    Raises ConfigError if the speeds are not as many as the ranks, or if there is nothing measured.
    """
    config, control = job.config, job.control
    path = config.run_folder / COSTS
    own = _cached(job, profile) if config.plan.costs == "measured" else profile
    of_ranks = [PassProfile(**each) for each in gathered(control, asdict(own))]
    links = [AllReduceSeconds(**each) for each in gathered(control, asdict(all_reduce))]
    ranks = control.world_size

    def decide() -> bytes:
        if config.train.resume and path.exists():
            try:
                before = PlanCosts.parse(read_bytes(path, _MOST_BYTES))
            except (OSError, ValueError) as error:
                print_line(f"d2ft-hpc: warning: {path}: not readable ({error}): costs are determined anew")
            else:
                if len(before.device_speed) == ranks:
                    return json.dumps(asdict(before)).encode()
        decided = replace(
            _costs(job, of_ranks),
            dense_seconds=float(np.nan_to_num(np.median([passes.dense_seconds for passes in of_ranks]))),
            message_latency=max(link.latency for link in links),
            seconds_per_byte=max(link.per_byte for link in links)
            / max(ring_bytes("allreduce", 1.0, ranks), 1e-9),
        )
        keep_costs(job, decided)
        return json.dumps(asdict(decided)).encode()

    return PlanCosts(**json.loads(share(control, decide, "costs of the plans")))


def keep_costs(job: Job, costs: PlanCosts) -> None:
    """For a resumed run, by rank 0."""
    folder = job.config.run_folder
    with writing(folder):
        _write(folder / COSTS, json.dumps(asdict(costs), indent=1).encode())


def _costs(job: Job, of_ranks: Sequence[PassProfile]) -> PlanCosts:
    costs = costs_unmeasured(job)
    if job.config.plan.costs != "measured":
        return costs
    if not np.isfinite([passes.dense_seconds for passes in of_ranks]).all():
        raise ConfigError("plan.costs='measured': a dense micro-batch did not fit on some rank; use flops")
    if job.config.plan.device_speed is None:
        costs = replace(costs, device_speed=relative_speeds([passes.dense_seconds for passes in of_ranks]))
    return replace(
        costs,
        forward_share=float(np.median([passes.forward_share for passes in of_ranks])),
        always_share=float(np.median([passes.always_share for passes in of_ranks])),
        source="measured",
    )


def costs_unmeasured(job: Job) -> PlanCosts:
    """The paper's costs, or those by FLOPs. Raises ConfigError if there are not as many speeds as ranks."""
    counted = PlanCosts.counted(job.costs, job.config.plan.device_speed, job.control.world_size)
    if job.config.plan.costs == "paper":
        return PlanCosts(PAPER_FORWARD_COST, 0.0, counted.device_speed, "paper")
    return counted


def _cached(job: Job, profile: PassProfile) -> PassProfile:
    """The profile that the cache folder has for this hardware and model. If it has none, it stores this one, and if
    it cannot be written, the run goes on without."""
    name = f"profile-{_key(job)}.json"
    try:
        cached = PassProfile(**read_json(cache_folder() / name, _MOST_BYTES))
        if all(isinstance(seconds, float) and not seconds <= 0 for seconds in vars(cached).values()):
            return cached
    except (OSError, ValueError, TypeError, RuntimeError):  # none yet, or damaged, or there is no home folder
        pass
    try:
        _write(cache_folder() / name, json.dumps(asdict(profile)).encode())
    except (OSError, RuntimeError) as error:
        if job.control.local_rank == 0:
            print_line(
                f"d2ft-hpc: warning: the measured costs are not kept for other runs ({error}): set D2FT_HPC_CACHE to a "
                f"folder that can be written"
            )
    return profile


def cache_folder() -> Path:
    """`D2FT_HPC_CACHE`, or d2ft-hpc in the user's cache folder."""
    own = os.environ.get("D2FT_HPC_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "d2ft-hpc"
    return folder.expanduser()


def _key(job: Job) -> str:
    """A text that stands for everything that decides how long a pass takes."""
    config: RunConfig = job.config
    hardware = _processor()
    if job.device.type == "cuda":
        hardware = torch.cuda.get_device_name(job.device)
    decisive = [
        hardware,
        torch.__version__,
        torch.get_num_threads(),
        config.model.model_dump(exclude={"weights"}),
        config.data.image_size,
        config.data.micro_batch_size,
        config.engine.precision,
        str(next(job.model.parameters()).dtype),
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]


def _processor() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _write(path: Path, content: bytes) -> None:
    """Writes the file as a whole or not at all, even if others write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, content, shared=True)
