"""A DeepSpeed training script as users have it; only the import and the JSON's "d2ft" section are ours."""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F

import d2ft_hpc as deepspeed
from tests.models import random_batch, tiny_vit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed_config")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_vit(qkv_bias=False)
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    accumulation = engine.gradient_accumulation_steps()
    losses = []
    for step in range(4):
        total = torch.zeros(())
        for micro_step in range(accumulation):
            images, labels = random_batch(1000 * step + 10 * micro_step + engine.global_rank, 8)
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
