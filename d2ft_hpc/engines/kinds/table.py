"""All engines. To add one, write its file here beside the others and name it below."""

from __future__ import annotations

from d2ft_hpc.engines.kinds.ddp import Ddp
from d2ft_hpc.engines.kinds.deepspeed import DeepSpeed
from d2ft_hpc.engines.kinds.fsdp2 import Fsdp2
from d2ft_hpc.engines.kinds.kind import EngineKind
from d2ft_hpc.engines.kinds.plain import Plain

ENGINES: dict[str, EngineKind] = {kind.name: kind for kind in (DeepSpeed(), Ddp(), Fsdp2(), Plain())}
"""By name, in the order in which messages list them."""
