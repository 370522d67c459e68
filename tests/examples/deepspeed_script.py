"""A DeepSpeed script as users have it: the import and the JSON's "d2ft" section are all that D2FT changes.

deepspeed --num_gpus 2 tests/examples/deepspeed_script.py
"""

import argparse

import timm
import torch
import torch.nn.functional as F

import d2ft_hpc as deepspeed  # was: import deepspeed

config = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "d2ft": {"compute_budget": 0.6, "total_steps": 6},
}
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.parse_args()
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

torch.manual_seed(engine.global_rank)
for step in range(6):
    for _ in range(engine.gradient_accumulation_steps()):
        images = torch.randn(8, 3, 64, 64, device=engine.device)
        labels = torch.randint(0, 10, (8,), device=engine.device)
        loss = F.cross_entropy(engine(images), labels)
        engine.backward(loss)
        engine.step()
    if engine.global_rank == 0:
        print(f"step {step}: loss {loss.item():.4f}, {engine.d2ft.overhead()}")
