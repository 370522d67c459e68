"""The loop of tests/examples/accelerate_fsdp2.py without this project: if it fails as well, the fault is upstream."""

import gc

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
)
accelerator = Accelerator(fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model, optimizer = accelerator.prepare(model, optimizer)
for _ in range(3):
    images = torch.randn(8, 3, 32, 32, device=accelerator.device)
    loss = F.cross_entropy(model(images), torch.zeros(8, dtype=torch.long, device=accelerator.device))
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")
accelerator.free_memory()
del model, optimizer, loss
gc.collect()
accelerator.end_training()
