"""Engines: what carries out a training step. `plain` is one process; `ddp` and `fsdp` are torch's data parallelism,
`deepspeed` is DeepSpeed's; `pipeline` and `tensor` are DeepSpeed where each rank holds a part of the model.

The folder `kinds` says what each can run, and lists them. `zero` knows what each ZeRO stage needs and refuses, `check`
compares a plan with an engine, `portable` is the state that every engine saves, `sharded` that of models spread as
DTensors, and what DeepSpeed does not document is in `deepspeed_private`; `private_names` asks for
what libraries do not promise.
"""
