"""Plans by attention heads in a loop that accumulates gradients, with a checkpoint: three lines more than dense.

python tests/examples/heads_loop.py
"""

import timm
import torch
import torch.nn.functional as F

import d2ft_hpc

SLOTS = 4  # micro-batches that make a step
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=4)
d2ft = d2ft_hpc.attach(
    model, compute_budget=0.6, planner="joint", micro_batches=SLOTS, results="runs/heads_loop"
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model.train()
for _ in range(3):
    total = 0.0
    for _slot in range(SLOTS):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
        loss = F.cross_entropy(model(images), labels) / SLOTS
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {total:.4f}")
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "d2ft": d2ft.state_dict()}
