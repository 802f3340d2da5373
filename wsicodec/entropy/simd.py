"""Vectors in compiled code: what numba intrinsics of this package are made with.

numba compiles scalar loops and leaves vectors to LLVM, which gives up where it cannot tell arrays
apart. The few loops that decide the speed are written in LLVM's intermediate language instead, in
vectors of sixteen 32-bit lanes; LLVM splits those on machines with shorter ones.

Addresses do not keep arrays alive: numba frees a local array after its last use by name. An array
whose address is taken has to be used, as an array, after the last use of the address, or to be an
argument.
"""

from __future__ import annotations

import functools
import inspect
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
REAL = ir.FloatType()
INTEGERS = ir.VectorType(I32, LANES)
REALS = ir.VectorType(REAL, LANES)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this x86 machine as Linux names them; empty elsewhere."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.split())


def compiled_for(flags: Iterable[str]) -> bool:
    """Whether numba compiles for instruction sets that the machine has. NUMBA_CPU_FEATURES, or the
    CPU name "generic", may ask it for fewer (caches that several machines share)."""
    from numba.core import config

    asked: str | None = vars(config)["CPU_FEATURES"]
    if asked is None:
        return True
    wanted = {f[1:] for f in asked.split(",") if f.startswith("+")}
    return wanted >= {flag.replace("_", "") for flag in flags}  # LLVM's names


def intrinsic_of(count: int, generate: Callable[..., None]) -> Any:
    """An intrinsic of ``count`` int64 arguments without result.

    generate(builder, arguments) writes the code; arguments that are addresses go through
    ``load`` and ``store``.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        generate(builder, arguments)
        return context.get_dummy_value()

    def typing(typingctx: Any, *arguments: Any) -> Any:
        return types.void(*[types.int64] * count), codegen

    # numba folds a star into a tuple: give it as many names as there are arguments
    names = ["context", *(f"argument{n}" for n in range(count))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    typing.__name__ = generate.__name__.strip("_")
    return intrinsic(typing)


def offset(builder: Any, address: Any, count: int) -> Any:
    return builder.add(address, I64(count)) if count else address


def load(builder: Any, address: Any, kind: Any) -> Any:
    """A value of type ``kind`` from an address of any alignment."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    """A value to an address of any alignment."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def splat(builder: Any, scalar: Any, vector: Any) -> Any:
    """A vector of one value."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, scalar, I32(0))
    mask = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, nothing, mask)


def shuffle(builder: Any, vector: Any, lanes: Sequence[int]) -> Any:
    """The given lanes of a vector."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def add_product(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """``total + a * b``, in one instruction where there is one."""
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))
