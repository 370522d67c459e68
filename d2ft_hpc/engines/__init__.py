"""Engines: what carries out a training step. `plain` is one process; `deepspeed` is DeepSpeed's data parallelism."""
