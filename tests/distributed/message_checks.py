"""Run under a launcher: bytes of a DeepSpeed step as counted, beside those that the message model says; prints JSON."""

from __future__ import annotations

import json
import sys

import torch

from d2ft_hpc.launch import connect, detect
from d2ft_hpc.metering import meter
from d2ft_hpc.planning.messages import Replicas
from tests.distributed.engine_checks import SLOTS, deepspeed_engine, micro_batch, plan_of
from tests.models import tiny_vit

STAGES = (0, 1)


def main() -> None:
    torch.set_num_threads(1)
    control = connect(detect(), device_type="cpu")
    results = {}
    for stage in STAGES:
        model = tiny_vit()
        engine = deepspeed_engine(model, "sgd", stage)
        engine.executor.load(plan_of("random", 0, control.world_size), control.rank)
        with meter() as metered:
            engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        every = sum(p.numel() * p.element_size() for p in model.parameters())
        told = Replicas(f"zero{stage}", control.world_size, SLOTS, trained, every, trained).bytes_of_step()
        results[f"zero{stage}"] = {"counted": metered.bytes_sent, "told": told}
    if control.rank == 0:
        print("RESULTS " + json.dumps(results))
    control.close()


if __name__ == "__main__":
    sys.exit(main())
