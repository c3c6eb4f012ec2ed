"""CPU kernels: linears over packed weights, and the steps around them, as torch operators.

One module per operator; the C++ is under `csrc/`. `docs/kernels.md` tells the layout and the figures.
"""

from __future__ import annotations

from compressor.kernels import loading


def available() -> bool:
    """Whether the compiled kernels can be used in this process."""
    return loading.LIBRARY is not None


def isa() -> str:
    """The instruction set in use (`amx`, `avx512_vnni`, `avx512`, `avx2_vnni`, `avx2`, `neon`, `scalar`) or `torch`.

    The environment variable HALFWEIGHT_ISA forces one; it is read once, when the kernels load.
    """
    loaded = loading.LIBRARY
    return "torch" if loaded is None else loaded.halfweight_isa().decode()


def supported_isas() -> list[str]:
    """What HALFWEIGHT_ISA accepts on this machine, best first; empty without the compiled kernels."""
    loaded = loading.LIBRARY
    return [] if loaded is None else loaded.halfweight_supported_isas().decode().split(",")


def set_batch_invariant(on: bool) -> None:
    """Whether, in this process, a token's result must not depend on how many others are computed with it.

    Off at first: many tokens then go through bf16 matrix tiles where the machine has them, faster and closer to exact
    than the int8 activations that few tokens get.
    """
    if loading.LIBRARY is not None:
        loading.LIBRARY.halfweight_set_batch_invariant(on)


def describe() -> str:
    """One line for people: which kernels run here."""
    if not available():
        return "no compiled kernels: packed weights are unpacked for torch"
    return f"CPU kernels with {isa()} (this machine also has {', '.join(supported_isas())})"
