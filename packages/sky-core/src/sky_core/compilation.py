"""What `torch.compile` costs a run: where its code is kept between runs, and the seconds it took.

Compiled code is kept by content (inductor's caches of graphs and of generated code), so a second run of the same layers
on the same machine loads instead of compiling. torch's own place for it is a temporary folder that a restart clears;
ours is in the user's cache, unless `TORCHINDUCTOR_CACHE_DIR` says otherwise.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from sky_core.files import cache_folder

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code() -> str:
    """Have this process keep compiled code in, and take it from, a folder that outlives it; returns the folder."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Inductor writes its own default into the variable the first time that it looks for its folder.
    if os.environ.get(CACHE) in (None, default_cache_dir()):
        os.environ[CACHE] = str(cache_folder("inductor"))
    return os.environ[CACHE]


class Compilation(NamedTuple):
    """What this process has compiled so far: seconds of it, graphs, and how many of them came from the cache."""

    seconds: float = 0.0
    graphs: int = 0
    cached: int = 0

    @classmethod
    def so_far(cls) -> Compilation:
        if "torch._dynamo.utils" not in sys.modules:  # which takes a second to import: nothing is compiled without it
            return cls()
        from torch._dynamo import utils

        return cls(
            utils.calculate_time_spent()["total_wall_time"],
            utils.counters["stats"]["unique_graphs"],
            utils.counters["aot_autograd"]["autograd_cache_hit"],
        )

    def since(self, before: Compilation) -> Compilation:
        return Compilation(self.seconds - before.seconds, self.graphs - before.graphs, self.cached - before.cached)

    def __str__(self) -> str:
        return f"layers compiled in {self.seconds:.1f} s ({self.graphs} graphs, {self.cached} of them from the cache)"
