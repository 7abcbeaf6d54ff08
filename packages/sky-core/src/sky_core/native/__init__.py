"""Operators in C++ where torch has none of the speed that the machine allows, compiled at their first use.

A step of decoding is made of two things, each a pass over memory with next to no arithmetic:

    y_MN   = torch.ops.sky.few_rows(x_MK, w_NK, scales_N=None)                     1 to 8 rows with a matrix
    y_BGRF = torch.ops.sky.few_queries(q_BGRE, k_BGSE, v_BGSF, bias, scale)        attention of one new token a row

x, q, k and v are fp32 or bf16, w also int8 (`scales` multiply its output features), the bias expands to (B, G, R, S);
sums are fp32, y has the dtype of x or q. There are no gradients. `load()` compiles them with the machine's C++ compiler
(`torch.compile` needs one as well), keeps them in the user's cache, and registers them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

from sky_core.files import cache_folder

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
MOST_ROWS = 8
"""Rows that `few_rows` takes."""
STEP = 32
"""`few_queries` takes heads whose width is a multiple of this."""

VECTORS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
}
"""What `torch.backends.cpu.get_cpu_capability` says -> flags of GCC and Clang; another machine takes their defaults."""


@cache
def load() -> bool:
    """Register the operators; false, and one warning, where they cannot be compiled."""
    try:
        torch.ops.load_library(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("native operators: none, torch's take their place: %s", reason.strip().splitlines()[0])
        return False
    torch.library.register_fake("sky::few_rows", _few_rows)
    torch.library.register_fake("sky::few_queries", _few_queries)
    return True


def _few_rows(x_MK: torch.Tensor, w_NK: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """What the compiler must know of the result."""
    return x_MK.new_empty(len(x_MK), len(w_NK))


def _few_queries(q_BGRE: torch.Tensor, _k: object, v_BGSF: torch.Tensor, *_: object) -> torch.Tensor:
    return q_BGRE.new_empty(*q_BGRE.shape[:3], v_BGSF.shape[3])


def _compiled() -> Path:
    """The library, compiled unless the cache holds it. Raises `OSError` or `subprocess.CalledProcessError`."""
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, g++ or clang++) is on the PATH")
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", *VECTORS.get(capability, "").split()]
    if capability in VECTORS:
        flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    flags += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    libraries = [flag for folder in cpp_extension.library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    sources = sorted(map(str, FOLDER.glob("*.cpp")))
    command = [compiler, *flags, *sources, *libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
    texts = [path.read_text(encoding="utf-8") for path in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")))]
    key = hashlib.sha256("\0".join([torch.__version__, *command, *texts]).encode())
    path = cache_folder("native") / f"sky-{key.hexdigest()[:16]}.so"
    if not path.exists():
        log.info("native operators: compiling %d files", len(sources))
        start = time.perf_counter()
        temporary = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(temporary)], check=True, capture_output=True, text=True)
        temporary.replace(path)
        log.info("native operators: compiled in %.0f s, kept in %s", time.perf_counter() - start, path.parent)
    return path
