"""Engines: what carries out a training step.

`plain` is one process, `deepspeed` DeepSpeed's data parallelism; `pipeline` and `tensor` are DeepSpeed where each rank
holds a part of the model.
"""
