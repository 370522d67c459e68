"""D2FT with a language model in Hugging Face's Trainer: `d2ft` marks what it adds. A model from `from_pretrained` goes
where the small one is made.

python tests/examples/decoder_trainer.py
torchrun --nproc_per_node 2 tests/examples/decoder_trainer.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import d2ft_hpc
from d2ft_hpc.user_loop.transformers import D2ftCallback

SLOTS, TOKENS, WORDS = 2, 32, 256  # SLOTS: micro-batches of a rank that make a step

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=WORDS,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=TOKENS,
    )
)
d2ft = d2ft_hpc.attach(model, compute_budget=0.6, planner="joint", micro_batches=SLOTS)
text = [torch.randint(WORDS, (TOKENS,)) for _ in range(96)]
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/decoder",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=SLOTS,
        max_steps=3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=[{"input_ids": ids, "labels": ids} for ids in text],
    callbacks=[D2ftCallback(d2ft)],
)
trainer.train()
if trainer.is_world_process_zero():
    for entry in trainer.state.log_history[:3]:
        print(f"loss {float(entry['loss']):.4f}")
    print(d2ft.report())
    generated = trainer.model.generate(text[0][None, :8].to(trainer.model.device), max_new_tokens=8)
    print(f"{generated.shape[1]} tokens")
