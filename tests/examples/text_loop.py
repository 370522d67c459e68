"""D2FT in a training loop of one's own with a language model, on 1 to N ranks: each step trains on the sequences that
the model gets wrong. `d2ft` marks every line that it adds. A model from `from_pretrained` goes where the small one is
made.

python tests/examples/text_loop.py
torchrun --nproc_per_node 2 tests/examples/text_loop.py
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import d2ft_hpc

WORDS, STEPS, SEQUENCES = 64, 3, 32  # SEQUENCES: of a rank's batch


def counted(start: int, length: int) -> torch.Tensor:
    """A sequence of a language in which each word follows from the one before; word 0 is padding."""
    return 1 + (start + 3 * torch.arange(length)) % (WORDS - 1)


def collate(sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = pad_sequence(sequences, batch_first=True)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


ranks = int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
texts = [counted(number, 12 + number % 20) for number in range(ranks * STEPS * SEQUENCES)]
sampler = DistributedSampler(texts, ranks, int(os.environ.get("RANK", "0")))
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=WORDS,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
    )
)
d2ft = d2ft_hpc.attach(model, compute_budget=0.6, planner="samples")
trained = DistributedDataParallel(model) if ranks > 1 else model
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for batch in DataLoader(texts, SEQUENCES, sampler=sampler, collate_fn=collate):
    batch = d2ft.choose(batch)
    loss = trained(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if ranks == 1 or dist.get_rank() == 0:
        print(f"loss {loss.item():.4f}, {len(batch['labels'])} of {SEQUENCES} sequences")
if ranks == 1 or dist.get_rank() == 0:
    print(d2ft.report())
if ranks > 1:
    dist.destroy_process_group()
