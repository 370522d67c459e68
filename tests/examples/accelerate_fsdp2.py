"""D2FT in a Hugging Face Accelerate loop over FSDP2; `attach` before `prepare`. On a CPU Accelerate takes DDP instead.

torchrun --nproc_per_node 2 tests/examples/accelerate_fsdp2.py
"""

import gc

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

import d2ft_hpc

SLOTS = 2  # micro-batches of a rank in a batch
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
)
accelerator = Accelerator(fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=4)
d2ft = d2ft_hpc.attach(
    model, compute_budget=0.6, planner="joint", micro_batches=SLOTS, results="runs/accelerate_fsdp2"
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.register_for_checkpointing(d2ft)  # its plan goes with save_state and load_state
accelerator.print(f"training a {type(model).__name__}")

model.train()
torch.manual_seed(accelerator.process_index)
for _ in range(3):
    for _slot in range(SLOTS):
        images = torch.randn(8, 3, 32, 32, device=accelerator.device)
        labels = torch.randint(0, 10, (8,), device=accelerator.device)
        loss = F.cross_entropy(model(images), labels) / SLOTS
        accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean').item() * SLOTS:.4f}")
# What holds the process group goes first: one that lives on leaves threads, under which the exit may abort.
accelerator.free_memory()
del model, optimizer, d2ft, loss
gc.collect()
accelerator.end_training()
