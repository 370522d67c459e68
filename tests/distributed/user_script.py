"""A DeepSpeed training script as users have it; only the import and the JSON's "d2ft" section are ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import d2ft_hpc as deepspeed
from tests.models import random_batch, tiny_vit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed_config")
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--wrapped", action="store_true", help="the model is inside a module of one's own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = json.loads(Path(args.deepspeed_config).read_text())
    is_pipeline, tensor_ranks = (
        "pipeline" in settings,
        settings.get("tensor_parallel", {}).get("autotp_size", 1),
    )
    model = tiny_vit(qkv_bias=False, num_heads=4)
    model = nn.Sequential(model) if args.wrapped else model
    engine, *_ = deepspeed.initialize(
        args=args,
        model=deepspeed.PipelineModule(model, loss_fn=F.cross_entropy) if is_pipeline else model,
        model_parameters=model.parameters(),
    )
    accumulation = engine.gradient_accumulation_steps()
    replica = engine.mpu.get_data_parallel_rank() if is_pipeline else engine.global_rank // tensor_ranks
    losses = []
    for step in range(4):
        total = torch.zeros(())
        batch = [random_batch(1000 * step + 10 * slot + replica, 8) for slot in range(accumulation)]
        if is_pipeline:
            total += engine.train_batch(iter(batch)).detach()
        for images, labels in () if is_pipeline else batch:
            loss = F.cross_entropy(engine(images), labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / accumulation
        torch.distributed.all_reduce(total)
        losses.append(float(total) / torch.distributed.get_world_size())
    if engine.global_rank == 0:
        print(engine.d2ft.overhead())
        print("RESULTS " + json.dumps({"losses": losses, "plan": engine.d2ft.plan.hash}))


if __name__ == "__main__":
    main()
