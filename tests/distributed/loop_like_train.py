"""A loop of one's own that trains as `d2ft-hpc train configs/demo.yaml` with random weights: the same images in the
same order, AdamW, one epoch. python loop_like_train.py FOLDER PLANNER [PLAN_FILE], on 1 to N ranks by torchrun.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch.nn.parallel import DistributedDataParallel

import d2ft_hpc
import d2ft_hpc.demo.model
from d2ft_hpc.config import DataConfig
from d2ft_hpc.data.datasets import open_split
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.data.sampler import MicroBatchSampler

SLOTS, RATE = 5, 1e-3
folder, planner, *plan_file = sys.argv[1:]
ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
if ranks > 1:
    dist.init_process_group("gloo")
data = DataConfig(name="digits", classes=[5, 6, 7, 8, 9], micro_batch_size=8, slots=SLOTS)
images = open_split(data, "train")
order = MicroBatchSampler(len(images), micro_batch_size=8, slots=SLOTS, replicas=ranks, replica=rank, seed=0)
steps = order.batches_per_epoch
torch.manual_seed(0)
model = timm.create_model("vit_digits_demo", num_classes=5)
planned = {"file": plan_file[0]} if plan_file else {"total_steps": steps}
d2ft = d2ft_hpc.attach(
    model, compute_budget=0.6, planner=planner, micro_batches=SLOTS, results=folder, **planned
)
trained = DistributedDataParallel(model) if ranks > 1 else model
optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=RATE)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
batches = iter(train_loader(images, order))
model.train()
for _ in range(steps):
    for slot in range(SLOTS):
        pixels, labels = next(batches)
        waits = ranks > 1 and slot < SLOTS - 1
        with trained.no_sync() if waits else nullcontext():
            loss = F.cross_entropy(trained(pixels), labels)
            d2ft.record.loss(loss)
            (loss / SLOTS).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
d2ft.record.close()
if ranks > 1:
    dist.destroy_process_group()
