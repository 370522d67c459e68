"""Plans in a training loop that the user owns: `attach`, or `initialize` in place of `deepspeed.initialize`."""
