"""Plans in a training loop that the user owns: `initialize` in place of `deepspeed.initialize`."""
