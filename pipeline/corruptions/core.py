"""The C core, libvqsa_corrupt.so, through ctypes. Loads without torch, DALI or a CUDA driver."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from pipeline.corruptions.kinds import KINDS, kind_number

LIBRARY = Path(__file__).with_name("libvqsa_corrupt.so")

MODE_CORRUPT, MODE_DRAW, MODE_APPLY = 0, 1, 2
IMPL_BEST, IMPL_EMULATED = 0, 1
OUT_OF_MEMORY = 2

JPEG_QUALITY_KIND = 100
"""Not in KINDS: JPEG at a quality given as severity, the pass that ImageNet-C's files went through."""

IMAGE_DTYPE = np.dtype(
    [
        ("in", np.uint64),
        ("out", np.uint64),
        ("key", np.uint64),
        ("height", np.int32),
        ("width", np.int32),
        ("kind", np.int32),
        ("severity", np.int32),
        ("fields", np.uint64),
        ("noise", np.uint64),
    ]
)
"""VqsaImage of csrc/core.h; pointers as integers."""


@functools.cache
def library() -> ctypes.CDLL:
    """Load the core once and declare its functions."""
    if not LIBRARY.is_file():
        raise FileNotFoundError(
            f"{LIBRARY} is missing: the native part is not built; "
            "run pip install -e . in the project's folder"
        )
    lib = ctypes.CDLL(str(LIBRARY))
    i32, i64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    lib.vqsa_last_error.restype = ctypes.c_char_p
    lib.vqsa_cpu_isa.restype = ctypes.c_char_p
    lib.vqsa_kind_available.argtypes = [i32]
    for name in ("vqsa_field_words", "vqsa_noise_words"):
        getattr(lib, name).argtypes = [i32] * 6
        getattr(lib, name).restype = i64
    lib.vqsa_run_cpu.argtypes = [pointer, i64, i32, i32, i32, i32, i32, ctypes.c_char_p]
    lib.vqsa_workspace_cuda.argtypes = [pointer, i64, i32, i32, i32, ctypes.POINTER(ctypes.c_size_t)]
    lib.vqsa_run_cuda.argtypes = [pointer, i64, i32, i32, i32, pointer, ctypes.c_size_t, pointer]
    lib.vqsa_set_frost_textures.argtypes = [pointer, pointer, pointer]
    lib.vqsa_philox4x32.argtypes = [pointer, pointer, pointer]
    return lib


def check(status: int) -> None:
    """Raise ValueError, or MemoryError, with the core's message when a call failed."""
    if status != 0:
        message: bytes = library().vqsa_last_error()
        raise (MemoryError if status == OUT_OF_MEMORY else ValueError)(message.decode())


@functools.cache
def available_kinds() -> tuple[str, ...]:
    """Return the kinds that the loaded core implements, in the order of KINDS."""
    lib = library()
    return tuple(name for number, name in enumerate(KINDS) if lib.vqsa_kind_available(number))


def kind_id(name: str) -> int:
    """Return a kind's number, its index in KINDS.

    Raises:
        ValueError: the name is unknown (the nearest is suggested), or this build lacks the kind.
    """
    number = kind_number(name)
    if name not in available_kinds():
        raise ValueError(
            f"corruption {name!r} is known but not implemented in this build; "
            f"available: {', '.join(available_kinds())}"
        )
    return number


def has_cuda() -> bool:
    """True where the core was built with CUDA (a driver may still be missing)."""
    return bool(library().vqsa_has_cuda())


def cpu_isa() -> str:
    """Return the instruction set in use: "generic", "v3" or "v4" (x86-64 levels)."""
    name: bytes = library().vqsa_cpu_isa()
    return name.decode()


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return Philox4x32-10 of a (4,) uint32 counter and a (2,) uint32 key, as (4,) uint32."""
    counter = np.ascontiguousarray(counter, np.uint32)
    key = np.ascontiguousarray(key, np.uint32)
    if counter.shape != (4,) or key.shape != (2,):
        raise ValueError(
            f"philox4x32 needs a counter (4,) and a key (2,), got {counter.shape} and {key.shape}"
        )
    out = np.empty(4, np.uint32)
    library().vqsa_philox4x32(counter.ctypes.data, key.ctypes.data, out.ctypes.data)
    return out


def run_cpu(
    images: np.ndarray,
    mode: int,
    flavour: int,
    constants: int,
    threads: int,
    impl: int = IMPL_BEST,
    isa: str | None = None,
) -> None:
    """Run a batch of IMAGE_DTYPE work orders on the CPU; the memory they point to must stay alive.

    `impl=IMPL_EMULATED` runs the CUDA form of every stage on the CPU, `isa` forces an instruction
    set; both are for tests.
    """
    check(
        library().vqsa_run_cpu(
            images.ctypes.data,
            len(images),
            mode,
            flavour,
            constants,
            threads,
            impl,
            isa.encode() if isa else None,
        )
    )


def workspace_cuda(images: np.ndarray, mode: int, flavour: int, constants: int) -> int:
    """Return the bytes of device scratch that run_cuda needs for this batch."""
    size = ctypes.c_size_t()
    check(
        library().vqsa_workspace_cuda(
            images.ctypes.data, len(images), mode, flavour, constants, ctypes.byref(size)
        )
    )
    return size.value


def run_cuda(
    images: np.ndarray, mode: int, flavour: int, constants: int, workspace: int, size: int, stream: int
) -> None:
    """Queue a batch on a CUDA stream of the current device; returns without waiting."""
    check(
        library().vqsa_run_cuda(
            images.ctypes.data, len(images), mode, flavour, constants, workspace, size, stream
        )
    )
