"""Runs a script as if started by itself, but with Accelerate's FSDP2 on CPUs too.

torchrun --nproc_per_node 2 tests/distributed/run_on_fsdp2.py SCRIPT
"""

import atexit
import os
import runpy
import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

_begin = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """Accelerate asks for an accelerator before it takes FSDP, and for nothing of it afterwards."""
    _begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = _with_fsdp
runpy.run_path(sys.argv[1], run_name="__main__")
# FSDP2's mesh keeps gloo's threads, under which an exit may abort.
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(0)
