"""D2FT in Lightning: `d2ft` marks what it adds; plan and replanning go with Lightning's checkpoints.

python tests/examples/lightning_loop.py
torchrun --nproc_per_node 2 tests/examples/lightning_loop.py
"""

import os

import lightning
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import d2ft_hpc

SLOTS = 2  # micro-batches of a rank that make a step


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=4)
        self.d2ft = d2ft_hpc.attach(self.vit, compute_budget=0.6, planner="joint", micro_batches=SLOTS)

    def training_step(self, batch, _):
        images, labels = batch
        self.loss = F.cross_entropy(self.vit(images), labels)
        return self.loss

    def on_before_optimizer_step(self, _):
        self.print(f"loss {self.loss.item():.4f}")

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.vit.parameters() if p.requires_grad], lr=1e-4)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["d2ft"] = self.d2ft.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.d2ft.load_state_dict(checkpoint["d2ft"])


ranks = int(os.environ.get("WORLD_SIZE", "1"))
lightning.seed_everything(0)
images, labels = torch.randn(48 * ranks, 3, 32, 32), torch.randint(0, 10, (48 * ranks,))
options = {
    "accelerator": "cpu" if not torch.cuda.is_available() else "gpu",
    "devices": ranks,
    "accumulate_grad_batches": SLOTS,
    "logger": False,
    "enable_progress_bar": False,
}
trainer = lightning.Trainer(max_steps=2, default_root_dir="runs/lightning", **options)
trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), batch_size=8))
trainer.save_checkpoint("runs/lightning/two-steps.ckpt")

resumed = lightning.Trainer(max_steps=3, default_root_dir="runs/lightning", **options)
model = Classifier()
resumed.fit(
    model, DataLoader(TensorDataset(images, labels), batch_size=8), ckpt_path="runs/lightning/two-steps.ckpt"
)
print(model.d2ft.report())
