"""The Hopper variant of the codebook search on the CPU (codebook_shim.py): TMA, memory barriers and wgmma."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from model.codebook.kernels import TILE_HOPPER, Kernels
from model.codebook.search import search_in_blocks
from tests.hostile_codebooks import CASES, NAMES, Case, all_equal, collapsed, data, near_duplicates, relu
from tests.test_codebook_kernels import check


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_hopper_variant_is_exact_on_hostile_data(shim: Kernels, case: Case) -> None:
    """Several code tiles, so that stages are used again."""
    check(shim, *data(case, 70, 600, 130), "l2", TILE_HOPPER)


@pytest.mark.parametrize("byte", [0, 0x3F, 0xBF, 0xFF])
def test_hopper_variant_heeds_nothing_beyond_the_codebook(shim: Kernels, byte: int) -> None:
    """Whole tiles of codes are looked at; what stands there after the last is whatever was in memory."""
    for k in (1, 250, 251, 300):
        z_ND, codes_KD = data(near_duplicates, 20, k, 40)
        prepared = torch.full((shim.prepared_bytes(k, 40, False),), byte, dtype=torch.uint8)
        shim.prepare(codes_KD, False, prepared)
        effort_2 = torch.zeros(2, dtype=torch.int64)
        found = shim.search(z_ND, codes_KD, False, prepared, tile=TILE_HOPPER, effort_2=effort_2)
        assert torch.equal(found.index_N, search_in_blocks(z_ND, codes_KD, False, 256)[0])
        assert effort_2[0] <= 3 * 20
        assert effort_2[1] == 0


def test_hopper_variant_by_cosine_and_over_row_tiles(shim: Kernels) -> None:
    for case in (relu, collapsed):
        check(shim, *data(case, 140, 300, 65), "cosine", TILE_HOPPER)
    assert check(shim, *data(all_equal, 30, 300, 40), tile=TILE_HOPPER) == (0, 30)


@pytest.mark.parametrize("call", ["search", "products"])
def test_hopper_variant_is_the_first_thing_that_a_thread_does(shim: Kernels, call: str) -> None:
    """With a codebook prepared elsewhere the thread has no CUDA context yet, which tensor maps need."""
    z_ND, codes_KD = data(relu, 5, 40, 64)
    prepared = shim.prepare(codes_KD, False)

    def work() -> Tensor:
        if call == "products":
            return shim.products(z_ND.half(), codes_KD.half(), TILE_HOPPER).argmax(1)
        return shim.search(z_ND, codes_KD, False, prepared, tile=TILE_HOPPER).index_N

    expected_N = work()
    with ThreadPoolExecutor(1) as fresh:
        assert torch.equal(fresh.submit(work).result(), expected_N)
