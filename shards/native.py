"""The C library beside this file (csrc/): structural scan, bulk reads, file mappings.

Loaded with ctypes, so every call runs without the interpreter lock.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

_ABI = 2
_PATH = Path(__file__).with_name("libvqsa_records.so")


class ScanStruct(ctypes.Structure):
    """`VqsaScan` of csrc/scan.h."""

    _fields_ = [
        ("fault", c_int32),
        ("format", c_int32),
        ("width", c_int32),
        ("height", c_int32),
        ("components", c_int32),
        ("orientation", c_int32),
    ]


def _load() -> ctypes.CDLL:
    if not _PATH.is_file():
        raise FileNotFoundError(
            f"{_PATH} is not there: the native record reader has not been built; "
            "run `pip install -e .` in the checkout"
        )
    library = ctypes.CDLL(str(_PATH))
    library.vqsa_records_abi.restype = c_int32
    found = library.vqsa_records_abi()
    if found != _ABI:
        raise ValueError(
            f"{_PATH} was built from other sources (interface {found}, wanted {_ABI}); "
            "run `pip install -e .` in the checkout again"
        )
    library.vqsa_scan.argtypes = [c_void_p, c_uint64, c_int32, c_int32, POINTER(ScanStruct)]
    library.vqsa_scan.restype = None
    library.vqsa_fault_words.argtypes = [c_int32]
    library.vqsa_fault_words.restype = c_char_p
    library.vqsa_read_records.argtypes = [c_int64, *[c_void_p] * 4, c_uint64, *[c_void_p] * 5]
    library.vqsa_read_records.restype = c_int64
    library.vqsa_scan_warm.argtypes = [c_int64, *[c_void_p] * 6]
    library.vqsa_scan_warm.restype = None
    library.vqsa_map_file.argtypes = [c_char_p, POINTER(c_uint64), POINTER(c_void_p)]
    library.vqsa_map_file.restype = c_int32
    library.vqsa_unmap_file.argtypes = [c_void_p, c_uint64]
    library.vqsa_unmap_file.restype = None
    return library


library = _load()
