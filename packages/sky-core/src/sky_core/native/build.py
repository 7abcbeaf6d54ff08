"""Compile the C++ of this folder into one library, once for each machine and version of torch."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sky_core.files import cache_folder

log = logging.getLogger("sky_core.native")

FOLDER = Path(__file__).parent

VECTORS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
}
"""What `torch.backends.cpu.get_cpu_capability` says -> flags of GCC and Clang; another machine takes their defaults."""


EXTENSIONS = {"avx512_bf16": "-mavx512bf16", "avx512_vnni": "-mavx512vnni", "avx512_vbmi": "-mavx512vbmi"}
"""Further instructions, as `torch.cpu.get_capabilities` calls them -> the flag that allows them."""


@cache
def has(*extensions: str) -> bool:
    """Whether this CPU has all of these `EXTENSIONS`, as far as torch can tell."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
    else:
        asked = {"avx512_bf16": "_is_avx512_bf16_supported", "avx512_vnni": "_is_vnni_supported"}
        known = {name: getattr(torch.cpu, function, bool)() for name, function in asked.items()}
    return all(known.get(extension, False) for extension in extensions)


def library() -> Path:
    """The library, compiled unless the cache holds it. Raises `OSError` or `subprocess.CalledProcessError`."""
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, g++ or clang++) is on the PATH")
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-std=c++20", "-O3", "-fopenmp", "-fPIC", *VECTORS.get(capability, "").split()]
    if capability in VECTORS:
        flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    flags += [flag for extension, flag in EXTENSIONS.items() if has(extension)]
    flags += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    links = [flag for folder in cpp_extension.library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    links += ["-ltorch", "-ltorch_cpu", "-lc10"]
    sources = sorted(FOLDER.glob("*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in [*sources, *sorted(FOLDER.glob("*.h"))]]
    key = hashlib.sha256("\0".join([torch.__version__, compiler, *flags, *texts]).encode()).hexdigest()[:16]
    path = cache_folder("native") / f"sky-{key}.so"
    if not path.exists():
        log.info("native operators: compiling %d files", len(sources))
        start = time.perf_counter()
        with TemporaryDirectory(dir=path.parent) as folder:
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            commands = [
                [compiler, *flags, "-c", str(one), "-o", str(to)] for one, to in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, commands))
            made = Path(folder) / path.name
            _run([compiler, "-shared", "-fopenmp", *map(str, objects), *links, "-o", str(made)])
            made.replace(path)
        log.info("native operators: compiled in %.0f s, kept in %s", time.perf_counter() - start, path.parent)
    return path


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
