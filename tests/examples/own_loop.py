"""D2FT in a training loop of one's own, on 1 to N ranks: `d2ft` marks every line that it adds to the dense one.

python tests/examples/own_loop.py
torchrun --nproc_per_node 2 tests/examples/own_loop.py
"""

import os

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import d2ft_hpc

ranks = int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
steps = 6
model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=4)
d2ft = d2ft_hpc.attach(model, compute_budget=0.6, total_steps=steps)
trained = DistributedDataParallel(model) if ranks > 1 else model
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model.train()
for _ in range(steps):
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    loss = F.cross_entropy(trained(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if ranks == 1 or dist.get_rank() == 0:
        print(f"loss {loss.item():.4f}")
if ranks == 1 or dist.get_rank() == 0:
    print(d2ft.report())
if ranks > 1:
    dist.destroy_process_group()
