"""The error bound's model of a tensor core, on products that are as bad for it as they can be.

What a tensor core adds is aligned to the largest exponent and cut off, so it loses most where one large product, or
two that cancel, stand beside many that are just below the last bit kept. On the host shim, and on an emulation of cores
that keep 24 bits (the bound must hold) or fewer (the data must show it); tests/test_codebook_gpu.py asks the device.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from model.codebook.kernels import TILE_HOPPER, TILE_NARROW, TILE_WIDE, Kernels
from model.codebook.search import search_in_blocks

TILES = {"wide": TILE_WIDE, "narrow": TILE_NARROW, "hopper": TILE_HOPPER}
LARGE = 2.0**14
BITS = (24, 23, 22, 20)
"""What a core may keep: the small products are just below the last of so many bits of the large one."""


def small(bits: int) -> float:
    """Largest float16 whose square is surely below the last of so many bits of LARGE squared."""
    return float(torch.tensor((1 - 2.0**-10) * LARGE * 2.0 ** ((1 - bits) / 2)).half())


def rate(dim: int) -> float:
    """accumulation_rate of csrc/prepare.h, without its reserve."""
    return 1.5 * dim * 2.0**-23


def one_large(dim: int) -> list[tuple[int, int]]:
    """A product that stays in the sum to the end, so that every other is cut off against it."""
    return [(0, 1)]


def cancelling_in_one_block(dim: int) -> list[tuple[int, int]]:
    """Two in the same four, in the middle: the sum is small before and after."""
    return [(dim // 2, 1), (dim // 2 + 3, -1)]


def cancelling_in_one_instruction(dim: int) -> list[tuple[int, int]]:
    """Two in the same sixteen, but not in the same eight."""
    return [(dim // 2 + 1, 1), (dim // 2 + 14, -1)]


def cancelling_in_every_block(dim: int) -> list[tuple[int, int]]:
    return [(j, sign) for first in range(0, dim, 16) for j, sign in ((first + 2, 1), (first + 9, -1))]


def cancelling_at_the_ends(dim: int) -> list[tuple[int, int]]:
    """What comes between is cut off against the first, which is gone in the end."""
    return [(0, 1), (dim - 1, -1)]


Where = Callable[[int], list[tuple[int, int]]]
CASES: list[Where] = [
    one_large, cancelling_in_one_block, cancelling_in_one_instruction, cancelling_in_every_block,
    cancelling_at_the_ends,
]  # fmt: skip
NAMES = [case.__name__ for case in CASES]


def operands(where: Where, n: int, k: int, dim: int, bits: int = 24) -> tuple[Tensor, Tensor]:
    """float16 features and codes with these large products ±LARGE², the others in [0.49, 1] · small(bits)²."""
    g = torch.Generator().manual_seed(dim)
    features_ND = small(bits) * (1 - 0.3 * torch.rand(n, dim, generator=g))
    codes_KD = small(bits) * (1 - 0.3 * torch.rand(k, dim, generator=g))
    features_ND[0] = codes_KD[0] = small(bits)
    for column, sign in where(dim):
        features_ND[:, column], codes_KD[:, column] = LARGE, sign * LARGE
    return features_ND.half(), codes_KD.half()


def share_of_rate(found_NK: Tensor, features_ND: Tensor, codes_KD: Tensor) -> float:
    """Largest error of the products in parts of what the bound allows."""
    features_ND, codes_KD = features_ND.double(), codes_KD.double()
    length_NK = features_ND.norm(dim=1)[:, None] * codes_KD.norm(dim=1)
    error_NK = (found_NK.cpu().double() - features_ND @ codes_KD.T).abs()
    return float((error_NK / length_NK).max()) / rate(features_ND.shape[1])


def assert_within_rate(
    kernels: Kernels, tile: int, where: Where, device: torch.device, n: int, k: int, dims: tuple[int, ...]
) -> None:
    for dim, bits in itertools.product(dims, BITS):
        features_ND, codes_KD = operands(where, n, k, dim, bits)
        found_NK = kernels.products(features_ND.to(device), codes_KD.to(device), tile)
        share = share_of_rate(found_NK, features_ND, codes_KD)
        assert share < 1, f"{share:.3g} of the rate at {dim} dimensions"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("where", CASES, ids=NAMES)
def test_shim_stays_within_the_rate(shim: Kernels, where: Where, tile: str) -> None:
    assert_within_rate(shim, TILES[tile], where, torch.device("cpu"), 4, 9, (32, 64, 512))


def cut(value: npt.NDArray[np.float64], unit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(unit > 0, np.trunc(value / np.where(unit > 0, unit, 1)) * unit, 0)


def last_place(value: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float64]:
    """What the last of so many bits of a number is worth; 0 for 0."""
    return np.where(value == 0, 0, np.ldexp(1.0, np.frexp(np.where(value == 0, 1, value))[1] - bits))


def emulated(features_ND: Tensor, codes_KD: Tensor, block: int, bits: int) -> Tensor:
    """The model: a block of products and the sum so far are aligned, cut off at `bits`, added, and cut off at 24."""
    product_NKD = features_ND.double().numpy()[:, None] * codes_KD.double().numpy()[None]
    sum_NK = np.zeros(product_NKD.shape[:2])
    for first in range(0, product_NKD.shape[2], block):
        term_NKB = np.concatenate([sum_NK[..., None], product_NKD[..., first : first + block]], axis=2)
        unit_NK1 = last_place(np.abs(term_NKB).max(2, keepdims=True), bits)
        sum_NK = cut(term_NKB, unit_NK1).sum(2)
        sum_NK = cut(sum_NK, last_place(np.abs(sum_NK), 24))
    return torch.from_numpy(sum_NK)


def share_of_core(where: Where, dim: int, block: int, bits: int, small_bits: int) -> float:
    features_ND, codes_KD = operands(where, 3, 5, dim, small_bits)
    return share_of_rate(emulated(features_ND, codes_KD, block, bits), features_ND, codes_KD)


@pytest.mark.parametrize("where", CASES, ids=NAMES)
@pytest.mark.parametrize("bits", BITS)
def test_rate_holds_for_every_core_of_the_model(where: Where, bits: int) -> None:
    for dim, block in itertools.product((32, 64, 512, 2048), (4, 8, 16)):
        assert share_of_core(where, dim, block, 24, bits) < 1


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("dim", [32, 512, 2048])
def test_data_show_a_core_that_keeps_fewer_bits(dim: int, block: int) -> None:
    assert share_of_core(one_large, dim, block, 24, 24) > 0.6, "near the rate"
    for bits in BITS[1:]:
        assert share_of_core(one_large, dim, block, bits, bits) > 1
    assert share_of_core(cancelling_at_the_ends, dim, block, 20, 20) > 1


def test_data_show_what_one_block_loses() -> None:
    """Beside norms that grow with the large products, in few dimensions only."""
    for where in CASES[1:4]:
        assert share_of_core(where, 32, 16, 20, 20) > 1


def cancelling_data(where: Where, n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """A codebook whose mean leaves the large values standing, and whose nearest code the small ones decide."""
    features_ND, codes_KD = (t.float() for t in operands(where, n, k, dim))
    sign_K1 = 1 - 2.0 * (torch.arange(k) % 2)[:, None]
    for column, _ in where(dim):
        codes_KD[:, column] *= sign_K1[:, 0]
    return features_ND, codes_KD


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("where", CASES, ids=NAMES)
def test_search_over_cancelling_products_is_exact(shim: Kernels, where: Where, tile: str) -> None:
    assert_exact_over_cancelling(shim, TILES[tile], where, torch.device("cpu"), 20, 300, 128)


def assert_exact_over_cancelling(
    kernels: Kernels, tile: int, where: Where, device: torch.device, n: int, k: int, dim: int
) -> None:
    z_ND, codes_KD = (t.to(device) for t in cancelling_data(where, n, k, dim))
    found = kernels.search(z_ND, codes_KD, False, kernels.prepare(codes_KD, False), tile=tile)
    index_N, sqdist_N = search_in_blocks(z_ND, codes_KD, False, 256)
    assert torch.equal(found.index_N, index_N)
    assert torch.equal(found.sqdist_N, sqdist_N)
