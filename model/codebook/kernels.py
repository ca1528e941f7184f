"""The fused search, libvqsa_codebook.so, through ctypes: buffers from torch's allocator, torch's current stream.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libvqsa_codebook.so")

TILE_AUTO, TILE_WIDE, TILE_NARROW, TILE_HOPPER, TILE_ANY = 0, 1, 2, 3, 4
"""VqsaTile of csrc/codebook.h."""

APART = 8
"""Added to a tile: features are converted in a launch of their own even where they are few (VQSA_APART)."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


class Nearest(NamedTuple):
    """What the kernels return."""

    index_N: Tensor
    """int64, −1 where the feature or any code is not finite."""

    sqdist_N: Tensor
    """float32, the distance that was minimised."""

    quantised_ND: Tensor
    """float32, the codes themselves; code 0 where the index is −1. Empty (0, D) if not asked for."""

    error_N: Tensor
    """float64 Σ(z − e)² of the vectors as stored, NaN where the index is −1. Empty (0,) if not asked for."""


class Kernels:
    """One build of the kernels: for "cuda" tensors, or, in the tests, for "cpu" ones."""

    def __init__(self, path: Path, device_type: str = "cuda") -> None:
        self.device_type = device_type
        lib = ctypes.CDLL(str(path))
        if not hasattr(lib, "vqsa_codebook_usable"):
            raise RuntimeError(
                f"{path} was built from older sources; build it again, where nvcc is found: "
                "pip install --no-build-isolation --no-deps -e ."
            )
        i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
        lib.vqsa_codebook_last_error.restype = ctypes.c_char_p
        lib.vqsa_codebook_max_dim.restype = i64
        lib.vqsa_codebook_prepared_bytes.argtypes = [i64, i32, i32]
        lib.vqsa_codebook_prepared_bytes.restype = i64
        lib.vqsa_codebook_workspace_bytes.argtypes = [i64, i64, i32, i32, i32]
        lib.vqsa_codebook_workspace_bytes.restype = i64
        lib.vqsa_codebook_prepare.argtypes = [
            pointer, i32, i64, i32, i32, pointer, pointer, pointer, i64, pointer,
        ]  # fmt: skip
        lib.vqsa_codebook_search.argtypes = [
            pointer, i32, i64, pointer, i32, i64, i32, i32, i32, *[pointer] * 10,
        ]  # fmt: skip
        lib.vqsa_codebook_products.argtypes = [
            pointer,
            pointer,
            i32,
            pointer,
            i64,
            i32,
            i32,
            pointer,
            pointer,
        ]
        lib.vqsa_codebook_capability.argtypes = [pointer]
        lib.vqsa_codebook_segment_sum_bytes.argtypes = [i64, i32]
        lib.vqsa_codebook_segment_sum_bytes.restype = i64
        lib.vqsa_codebook_segment_sum.argtypes = [
            pointer, i32, i64, i32, *[pointer] * 5, i64, pointer, pointer,
        ]  # fmt: skip
        self._lib = lib
        self._capabilities: dict[torch.device, int] = {}
        self._usable: dict[torch.device, bool] = {}
        self.max_dim: int = lib.vqsa_codebook_max_dim()
        lib.vqsa_codebook_together.restype = i64

    def _check(self, status: int) -> None:
        if status != 0:
            why: bytes = self._lib.vqsa_codebook_last_error()
            raise RuntimeError(f"codebook kernels: {why.decode()}")

    def capability(self, device: torch.device) -> int:
        """Compute capability of a device, 90 for 9.0."""
        if device not in self._capabilities:
            found = ctypes.c_int32()
            with _device(device):
                self._check(self._lib.vqsa_codebook_capability(ctypes.byref(found)))
            self._capabilities[device] = found.value
        return self._capabilities[device]

    def usable(self, device: torch.device) -> bool:
        """Whether there is code for a device; asked once for each, and a warning says once where there is none."""
        if device not in self._usable:
            # Asking loads the kernels, which a capture may not allow.
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return True
            with _device(device):
                self._usable[device] = self._lib.vqsa_codebook_usable() == 1
            if not self._usable[device]:
                self._warn_foreign(device)
        return self._usable[device]

    def _warn_foreign(self, device: torch.device) -> None:
        self._lib.vqsa_codebook_architectures.restype = ctypes.c_char_p
        built = self._lib.vqsa_codebook_architectures().decode()
        name, wanted = str(device), "native"
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            name += f" ({found.name}, compute capability {found.major}.{found.minor})"
            wanted = f"{found.major}{found.minor}{'a' if found.major == 9 else ''}-real"
        warnings.warn(
            f"the codebook kernels cannot run on {name}: they were built for {built}. Torch "
            "searches instead, slower and with the same answers. To build them for it, where nvcc is found: "
            f"VQSA_CUDA_ARCHS='{wanted}' pip install --no-build-isolation --no-deps -e .",
            RuntimeWarning,
            stacklevel=3,
        )

    def together(self) -> int:
        """Searches of this process so far that converted their features in the launch of the search."""
        count: int = self._lib.vqsa_codebook_together()
        return count

    def prepared_bytes(self, codes: int, dim: int, cosine: bool) -> int:
        """Bytes that a prepared codebook takes."""
        size: int = self._lib.vqsa_codebook_prepared_bytes(codes, dim, cosine)
        return size

    def workspace_bytes(
        self, features: int, codes: int, dim: int, cosine: bool, tile: int = TILE_AUTO
    ) -> int:
        """Bytes of scratch for one search or one `prepare`."""
        size: int = self._lib.vqsa_codebook_workspace_bytes(features, codes, dim, cosine, tile)
        self._check(size == 0)
        return size

    def prepare(
        self, codes_KD: Tensor, cosine: bool, prepared: Tensor | None = None, changed_T: Tensor | None = None
    ) -> Tensor:
        """Prepare a codebook for searching, or do its changed codes again.

        Args:
            codes_KD: contiguous, float16, bfloat16 or float32.
            cosine: for the metric "cosine".
            prepared: buffer of an earlier call to write into.
            changed_T: int64 numbers, each at most once, of the codes that changed since `prepared` was
                written, which keeps its centre. None: all, with a new centre.

        Returns:
            The buffer, uint8.
        """
        codes, dim = codes_KD.shape
        if prepared is not None and changed_T is not None and len(changed_T) == 0:
            return prepared  # its address would be null, which means all codes
        if prepared is None:
            prepared = codes_KD.new_empty(self.prepared_bytes(codes, dim, cosine), dtype=torch.uint8)
        with _device(codes_KD.device):
            workspace = codes_KD.new_empty(self.workspace_bytes(1, codes, dim, cosine), dtype=torch.uint8)
            self._check(
                self._lib.vqsa_codebook_prepare(
                    codes_KD.data_ptr(), _TYPES[codes_KD.dtype], codes, dim, cosine,
                    prepared.data_ptr(), workspace.data_ptr(),
                    None if changed_T is None else changed_T.data_ptr(),
                    0 if changed_T is None else len(changed_T), stream_of(codes_KD),
                )
            )  # fmt: skip
        return prepared

    def search(
        self, z_ND: Tensor, codes_KD: Tensor, cosine: bool, prepared: Tensor, gather: bool = False,
        usage_K: Tensor | None = None, tile: int = TILE_AUTO, effort_2: Tensor | None = None,
        alarm_1: Tensor | None = None,
    ) -> Nearest:  # fmt: skip
        """Search, and gather if asked.

        Args:
            z_ND: contiguous, float16, bfloat16 or float32.
            codes_KD: as `prepare` had it.
            prepared: what `prepare` returned for it.
            gather: also return quantised_ND and error_N.
            usage_K: int64; how many features chose each code is added.
            tile: how to cut the work.
            effort_2: int64; how many candidates were measured and how many features were scanned again is added.
            alarm_1: int32, on the device or page-locked; set to 1 if the Hopper kernel stalled. The answer is
                right then too.
        """
        count, dim = z_ND.shape
        codes = codes_KD.shape[0]
        result = Nearest(
            z_ND.new_empty(count, dtype=torch.int64),
            z_ND.new_empty(count, dtype=torch.float32),
            z_ND.new_empty(count if gather else 0, dim, dtype=torch.float32),
            z_ND.new_empty(count if gather else 0, dtype=torch.float64),
        )
        with _device(z_ND.device):
            # Of the device that searches: its multiprocessors decide how much is needed.
            size = self.workspace_bytes(count, codes, dim, cosine, tile)
            workspace = z_ND.new_empty(size, dtype=torch.uint8)
            self._check(
                self._lib.vqsa_codebook_search(
                    z_ND.data_ptr(), _TYPES[z_ND.dtype], count, codes_KD.data_ptr(), _TYPES[codes_KD.dtype],
                    codes, dim, cosine, tile, prepared.data_ptr(), workspace.data_ptr(),
                    result.index_N.data_ptr(), result.sqdist_N.data_ptr(),
                    result.quantised_ND.data_ptr() if gather else None,
                    result.error_N.data_ptr() if gather else None,
                    *(None if t is None else t.data_ptr() for t in (usage_K, effort_2, alarm_1)), stream_of(z_ND),
                )
            )  # fmt: skip
        return result

    def segment_sum(
        self, z_ND: Tensor, order_N: Tensor, slot_N: Tensor, out_SD: Tensor,
        code_ND: Tensor | None = None, scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """out[s] = Σ z[order[i]] over the i whose slot is s, or scale · Σ (code − z), in float64 and a fixed order.

        Args:
            z_ND: contiguous, float16, bfloat16, float32 or float64.
            order_N: int64, the features sorted by slot.
            slot_N: int32, ascending: the row of the result of each, negative to leave the feature out.
            out_SD: float64 if z is, else float32; written and returned.
            code_ND: contiguous float32.
            scale: float64 scalar.
        """
        count, dim = z_ND.shape
        workspace = z_ND.new_empty(self._lib.vqsa_codebook_segment_sum_bytes(count, dim), dtype=torch.uint8)
        with _device(z_ND.device):
            self._check(
                self._lib.vqsa_codebook_segment_sum(
                    z_ND.data_ptr(), _TYPES[z_ND.dtype], count, dim, order_N.data_ptr(), slot_N.data_ptr(),
                    *(None if t is None else t.data_ptr() for t in (code_ND, scale)),
                    out_SD.data_ptr(), len(out_SD), workspace.data_ptr(), stream_of(z_ND),
                )
            )  # fmt: skip
        return out_SD

    def products(self, features_ND: Tensor, codes_KD: Tensor, tile: int) -> Tensor:
        """z·e of float16 matrices, float32 (N, K), accumulated as the search does; D a multiple of 32."""
        count, dim = features_ND.shape
        out_NK = features_ND.new_empty(count, codes_KD.shape[0], dtype=torch.float32)
        numbers_N = torch.arange(count, dtype=torch.int32, device=features_ND.device)
        with _device(features_ND.device):
            self._check(
                self._lib.vqsa_codebook_products(
                    features_ND.data_ptr(), numbers_N.data_ptr(), count, codes_KD.data_ptr(),
                    codes_KD.shape[0], dim, tile, out_NK.data_ptr(), stream_of(features_ND),
                )
            )  # fmt: skip
        return out_NK


@functools.cache
def kernels() -> Kernels | None:
    """The kernels of this installation; None where it was built without nvcc."""
    return Kernels(LIBRARY) if LIBRARY.is_file() else None


def kernels_for(z_ND: Tensor, impl: str) -> Kernels | None:
    """The kernels to use for these features; None for the torch implementation.

    Raises:
        ValueError: impl is "cuda" or "hopper" and there are none that can do it.
    """
    found = None if impl == "torch" else kernels()
    fits = found is not None and z_ND.device.type == found.device_type and z_ND.shape[1] <= found.max_dim
    if found is not None and fits and found.usable(z_ND.device):
        return found
    if impl in ("cuda", "hopper"):
        built = "built without nvcc" if found is None else f"for up to {found.max_dim} dimensions"
        built = "built for other devices" if fits else built
        raise ValueError(
            f"nearest_code with impl {impl!r} needs CUDA tensors and the CUDA kernels ({built}), got "
            f"{tuple(z_ND.shape)} on {z_ND.device}; choose impl 'auto' or 'torch'"
        )
    return None


def stream_of(tensor: Tensor) -> int | None:
    """Handle of the stream that work on this tensor is queued on now; None on a CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def _device(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device if device.type == "cuda" else -1)
