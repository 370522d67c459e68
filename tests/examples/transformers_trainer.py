"""D2FT in Hugging Face's Trainer: `d2ft` marks what it adds; plan and replanning go with the trainer's checkpoints.

python tests/examples/transformers_trainer.py
torchrun --nproc_per_node 2 tests/examples/transformers_trainer.py
"""

import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

import d2ft_hpc
from d2ft_hpc.user_loop.transformers import D2ftCallback

SLOTS = 2  # micro-batches of a rank that make a step


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=4)

    def forward(self, pixel_values, labels):
        logits = self.vit(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer(steps):
    torch.manual_seed(0)
    model = Classifier()
    d2ft = d2ft_hpc.attach(model, compute_budget=0.6, planner="joint", micro_batches=SLOTS)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(96)]
    arguments = TrainingArguments(
        "runs/transformers",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=SLOTS,
        max_steps=steps,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    return Trainer(model, arguments, train_dataset=data, callbacks=[D2ftCallback(d2ft)]), d2ft


trainer(steps=2)[0].train()
resumed, d2ft = trainer(steps=3)
resumed.train(resume_from_checkpoint=True)
if resumed.is_world_process_zero():
    for entry in resumed.state.log_history[:3]:
        print(f"loss {float(entry['loss']):.4f}")
    print(d2ft.report())
