"""The decoder as one native call: exported, compiled ahead of time, and kept on disk.

Llama-like layers whose linears all go through our kernels are one operator (`decoder_layers`) and need none of this; it
is for the others, dense ones for instance where torch runs their linears. A step of a small model is hundreds of
operators of a few microseconds each, and calling them from Python costs as much as running them. `torch.export` and
AOTInductor write the whole step as a C++ program. It is compiled once per model geometry, format and version, in a
process of its own while this one answers eagerly, and loaded in milliseconds at the next start, without importing the
compiler. Sizes that change from step to step are symbols, so one program serves decode and prefill of any batch.
Weights stay outside: the program borrows this process's tensors.

Shapes: T tokens, S sequences, as in `StepInputs`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels import loading
from compressor.kernels.attention import cache_dtype_of, empty_cache
from compressor.kernels.fakes import FAKES
from compressor.machine import cache_folder
from compressor.output import sync
from serve.engine.models.decoder import Decoder, StepInputs
from serve.process import end_with_parent

logger = logging.getLogger(__name__)

SOURCES = ("compiled.py", "ops.py", "models/decoder.py", "models/linears.py")
INDUCTOR = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "cpp_cache_precompile_headers": False,
}


class CompiledStep:
    """A loaded program, called with the same arguments as the decoder it was made from.

    RuntimeError: the file is damaged.
    """

    def __init__(self, path: Path, decoder: Decoder) -> None:
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        buffers = {f"decoder.{name}": b for name, b in decoder.named_buffers(remove_duplicate=False)}
        wanted = self._loader.get_constant_fqns()
        self._weights = {name: buffers[name] for name in wanted}
        # use_inactive=False, check_full_update=True, user_managed=True: borrowed, never copied.
        self._loader.load_constants(self._weights, False, True, True)

    def __call__(self, step: StepInputs, k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        hidden_TC: Tensor = self._loader.boxed_run([*step, *k_caches, *v_caches])[0]
        return hidden_TC


class _Step(nn.Module):
    """The decoder with plain tuples and lists as arguments, as `torch.export` wants them."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, step: tuple[Tensor, ...], k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        hidden_TC: Tensor = self.decoder(StepInputs(*step), k_caches, v_caches)
        return hidden_TC


def can_compile(decoder: Decoder) -> bool:
    """Whether every operator of the step is one that the compiler can call."""
    return loading.LIBRARY is not None and decoder.dtype == torch.bfloat16 and decoder.config.head_dim % 16 == 0


def program_path(decoder: Decoder, block_size: int, cache_dtype: str) -> Path:
    """Where the program of this model is kept: a name that changes with everything it depends on."""
    digest = hashlib.sha256()
    digest.update(f"{torch.__version__} {decoder.config} {decoder.dtype} {block_size} {cache_dtype}".encode())
    for name, buffer in sorted(decoder.named_buffers(remove_duplicate=False)):
        if name != "cos_sin":  # programs hand it on whatever its length
            digest.update(f"{name} {tuple(buffer.shape)} {buffer.dtype}".encode())
    digest.update(_processor().encode())
    own = [Path(__file__).parent / source for source in SOURCES]
    for source in (*own, *sorted(Path(loading.__file__).parent.glob("*.py"))):
        digest.update(source.read_bytes())
    for operator in sorted(FAKES):
        digest.update(str(getattr(torch.ops.halfweight, operator).default._schema).encode())
    return cache_folder() / "programs" / f"{digest.hexdigest()[:32]}.pt2"


def _processor() -> str:
    """The model and the abilities of this processor: programs are made for it alone."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    first = path.read_text().partition("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("model name", "flags", "Features", "CPU")))


def compile_program(decoder: Decoder, block_size: int, cache_dtype: str, path: Path) -> None:
    """Export and compile; takes seconds to minutes, and the compiler's memory."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    inputs, dynamic = _example(decoder, block_size, cache_dtype)
    with torch.no_grad():
        program = torch.export.export(_Step(decoder), inputs, dynamic_shapes=dynamic, strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package = str(Path(folder) / "program.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=INDUCTOR)
        sync(Path(package))
        os.replace(package, path)


def _example(decoder: Decoder, block_size: int, cache_dtype: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A small step, and which of its sizes vary: tokens, sequences, blocks a sequence, blocks in the cache."""
    step = (
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(3, 5, dtype=torch.int32),
        torch.tensor([0, 2, 3, 4], dtype=torch.int32),
        torch.tensor([2, 1, 1], dtype=torch.int32),
    )
    config, vary = decoder.config, torch.export.Dim.AUTO
    cache = empty_cache(7, block_size, config.num_kv_heads, config.head_dim, cache_dtype_of(cache_dtype))
    caches = [[torch.zeros_like(cache) for _ in range(config.num_layers)] for _ in range(2)]
    dynamic = ({0: vary}, {0: vary}, {0: vary}, {0: vary, 1: vary}, {0: vary}, {0: vary})
    return (step, *caches), (dynamic, *([{0: vary}] * config.num_layers for _ in range(2)))


class BackgroundCompiler:
    """Makes the program in another process; `ready` is called with it, from a thread of its own."""

    def __init__(
        self, folder: Path, decoder: Decoder, block_size: int, cache_dtype: str, ready: Callable[[CompiledStep], None]
    ) -> None:
        self.path = program_path(decoder, block_size, cache_dtype)
        self._decoder = decoder
        self._ready = ready
        command = [sys.executable, "-m", "serve.engine.compiled", str(folder), "--block-size", str(block_size)]
        command += ["--kv-cache-dtype", cache_dtype]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._wait, name="compiler", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()

    def _wait(self) -> None:
        began = time.perf_counter()
        _, errors = self._process.communicate()
        if self._process.returncode < 0:
            return
        if self._process.returncode or not self.path.is_file():
            logger.warning("steps stay uncompiled: %s", (errors.strip().splitlines() or ["no reason given"])[-1])
            return
        logger.info("compiled in %.0f s", time.perf_counter() - began)
        self._ready(CompiledStep(self.path, self._decoder))


def main() -> int:
    """`python -m serve.engine.compiled FOLDER`: compile in this process, at low priority, and exit."""
    parser = argparse.ArgumentParser("python -m serve.engine.compiled", description="Compile a model's step.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--kv-cache-dtype", default="bfloat16")
    options = parser.parse_args()
    end_with_parent()
    os.nice(10)
    torch.set_num_threads(1)
    from serve.engine.weights import load_model

    decoder = load_model(options.folder).decoder
    assert isinstance(decoder, Decoder)
    decoder.reach(1)
    geometry = (options.block_size, options.kv_cache_dtype)
    compile_program(decoder, *geometry, program_path(decoder, *geometry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
