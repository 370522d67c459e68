"""D2FT in the simplest training loop: `attach` is the line that it adds, and `report` tells what it did.

python tests/examples/first_loop.py
"""

import timm
import torch
import torch.nn.functional as F

import d2ft_hpc

steps = 6
model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=4)
d2ft = d2ft_hpc.attach(model, compute_budget=0.6, total_steps=steps)  # before the optimizer
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
for _ in range(steps):
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
print(d2ft.report())
