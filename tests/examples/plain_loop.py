"""D2FT in a plain training loop: each step runs the attention heads that its plan chooses.

python tests/examples/plain_loop.py
"""

import numpy as np
import timm
import torch
import torch.nn.functional as F

import d2ft_hpc
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.planning import PlanProblem, solve
from d2ft_hpc.scores import fisher_information

torch.manual_seed(0)
SLOTS = 4  # micro-batches in a batch
model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=4)
batches = [[(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))) for _ in range(SLOTS)] for _ in range(3)]

executor = d2ft_hpc.attach(model)  # before the optimiser: it freezes what lies below the blocks
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

# Scores of the first batch, costs of the model, and the best plan for 60 % of the dense compute.
scores = np.concatenate(
    [fisher_information(model, executor.subnets, *pair, F.cross_entropy).numpy() for pair in batches[0]]
)
costs = measure_costs(model, executor, (3, 32, 32))
problem = PlanProblem.parallel(
    scores, scores, compute_budget=0.6, forward_cost=costs.forward_share, always_share=costs.always_share
)
plan = solve(problem, "joint")
executor.activate(plan, replica=0)
print(f"{costs.planned_share(plan):.0%} of the dense compute")

model.train()
for batch in batches:
    total = 0.0
    for slot, (images, labels) in enumerate(batch):
        with executor.micro_batch(slot):  # forward and backward inside
            loss = F.cross_entropy(model(images), labels) / SLOTS
            loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {total:.4f}")
