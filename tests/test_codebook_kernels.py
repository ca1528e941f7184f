"""The CUDA kernels of the codebook search, run on the CPU (codebook_shim.py).

The same source that nvcc compiles, with barriers, cp.async, ldmatrix and mma carried out one by one. What it
must give is what `nearest_code` gives with torch alone, which its own tests hold to float64 brute force.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.codebook.choice import VARIABLE
from model.codebook.kernels import (
    APART,
    TILE_ANY,
    TILE_AUTO,
    TILE_HOPPER,
    TILE_NARROW,
    TILE_WIDE,
    Kernels,
)
from model.codebook.search import _fold, search_in_blocks
from tests.hostile_codebooks import (
    CASES,
    NAMES,
    Case,
    all_equal,
    collapsed,
    data,
    gaussian,
    near_duplicates,
    relu,
)

# Shapes: N = features, K = codes, D = feature dimension.

TILES = {"wide": TILE_WIDE, "narrow": TILE_NARROW}


@pytest.fixture(autouse=True)
def mma_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mma")


def check(
    shim: Kernels, z_ND: Tensor, codes_KD: Tensor, metric: str = "l2", tile: int = TILE_AUTO
) -> tuple[int, int]:
    """Compare with the torch search bit for bit; return the candidates measured and the features scanned again."""
    cosine = metric == "cosine"
    device = z_ND.device
    effort_2, usage_K = (torch.zeros(n, dtype=torch.int64, device=device) for n in (2, len(codes_KD)))
    alarm_1 = torch.zeros(1, dtype=torch.int32, device=device)
    prepared = shim.prepare(codes_KD, cosine)
    found = shim.search(z_ND, codes_KD, cosine, prepared, True, usage_K, tile, effort_2, alarm_1)
    assert alarm_1.item() == 0
    index_N, sqdist_N = search_in_blocks(z_ND, codes_KD, cosine, 256)
    assert torch.equal(found.index_N, index_N)
    assert torch.equal(found.sqdist_N, sqdist_N)
    assert torch.equal(found.quantised_ND, codes_KD[index_N].float()), "the code to the last bit"
    error_N = _fold((codes_KD[index_N].double() - z_ND.double()).square_())
    assert torch.equal(found.error_N, error_N), "float64 sums in the one order"
    assert torch.equal(usage_K, index_N.bincount(minlength=len(codes_KD)))
    candidates, scanned = effort_2.tolist()
    return candidates, scanned


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("tile", TILES)
def test_exact_on_hostile_data(shim: Kernels, case: Case, metric: str, tile: str) -> None:
    candidates, scanned = check(shim, *data(case, 63, 301, 130), metric, TILES[tile])
    assert candidates >= 63 - scanned


def test_exact_where_half_the_square_of_a_code_underflows(shim: Kernels) -> None:
    """Codes ±1 make the units; between the others decide digits that float32 loses of ½‖e‖² there."""
    a, b = (2.0**-69 * (1 + share * 2.0**-10) for share in (0.255, 0.245))
    codes_62 = torch.tensor([[1, 0], [-1, 0], [a, 0], [-a, 0], [0, b], [0, -b]])
    for scale in (1.0, 2.0**20, 2.0**50):
        check(shim, scale * torch.tensor([[2.0**-82.3, 0]]), scale * codes_62)


@pytest.mark.parametrize("tile", [*TILES, "hopper"])
def test_exact_over_all_magnitudes(shim: Kernels, tile: str) -> None:
    """Codebooks with a centre near zero, code norms and features over 100 octaves; against brute force."""
    g = torch.Generator().manual_seed(11)
    for _ in range(60):
        octave_S1 = torch.randint(-90, 1, (20, 1), generator=g).repeat_interleave(2, 0).double()
        octave_S1[4:] = octave_S1[4] - torch.rand(36, 1, generator=g).double() / 512
        half_SD = gaussian(g, 20, 2).double()
        half_SD /= half_SD.norm(dim=1, keepdim=True)
        codes_KD = (half_SD.repeat_interleave(2, 0) * 2**octave_S1).float()
        codes_KD[1::2] *= -1
        codes_KD[:2] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        z_ND = gaussian(g, 64, 2) * 2.0 ** torch.randint(-100, 1, (64, 1), generator=g)
        shift = 2.0 ** int(torch.randint(-20, 60, (1,), generator=g))
        z_ND, codes_KD = z_ND * shift, codes_KD * shift
        exact_NK = (z_ND.double()[:, None] - codes_KD.double()).square().sum(2)
        code = {**TILES, "hopper": TILE_HOPPER}[tile]
        found = shim.search(z_ND, codes_KD, False, shim.prepare(codes_KD, False), tile=code)
        assert torch.equal(found.index_N, exact_NK.argmin(1))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_exact_over_row_tiles_and_splits(shim: Kernels, case: Case) -> None:
    check(shim, *data(case, 150, 700, 33))


FEW = [(case, "narrow", "l2", 11, 700) for case in CASES]
FEW += [
    (near_duplicates, tile, metric, n, k)
    for tile in TILES
    for metric in ("l2", "cosine")
    for n, k in ((1, 700), (11, 40), (11, 700))
]
"""More features than parts of the codebook, as many and fewer."""


@pytest.mark.parametrize(("case", "tile", "metric", "n", "k"), FEW)
def test_few_features_are_converted_in_the_launch_of_the_search(
    shim: Kernels, case: Case, tile: str, metric: str, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQSA_SHIM_MULTIPROCESSORS", "11")
    before = shim.together()
    check(shim, *data(case, n, k, 40), metric, TILES[tile])
    assert shim.together() == before + 1
    check(shim, *data(case, n, k, 40), metric, TILES[tile] + APART)
    assert shim.together() == before + 1


@pytest.mark.parametrize(
    ("n", "tile", "fault"), [(12, TILE_AUTO, ""), (5, TILE_HOPPER, ""), (5, TILE_AUTO, "alone")]
)
def test_others_are_converted_first(
    shim: Kernels, n: int, tile: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are blocks at once, those for TMA, and where blocks cannot run side by side."""
    monkeypatch.setenv("VQSA_SHIM_MULTIPROCESSORS", "11")
    monkeypatch.setenv("VQSA_SHIM_FAULT", fault)
    before = shim.together()
    check(shim, *data(relu, n, 300, 40), tile=tile)
    assert shim.together() == before


@pytest.mark.parametrize("case", [CASES[0], collapsed])
def test_exact_at_the_trunk_dimension(shim: Kernels, case: Case) -> None:
    check(shim, *data(case, 9, 130, 2048))


@pytest.mark.parametrize(
    "dim", [1, 31, 40, 512, 513, 1024, 1025, 1280, 2048, 2050, 2052, 4096, 4097, 8192, 8200, 16_384]
)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_sums_are_folded_as_documented_at_every_dimension(shim: Kernels, dim: int, metric: str) -> None:
    """Those that divide by enough are read four values at a time, up to sixteen of a row before the first is used."""
    check(shim, *data(CASES[0], 3, 5, dim), metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_that_begin_anywhere(shim: Kernels, dtype: torch.dtype) -> None:
    """Views whose first value cannot be read together with the next three: the shim aborts on such an address."""

    def moved(rows_RD: Tensor, by: int) -> Tensor:
        storage = torch.empty(rows_RD.numel() + by, dtype=dtype)
        return storage[by:].view(rows_RD.shape).copy_(rows_RD)

    z_ND, codes_KD = (rows_RD.to(dtype) for rows_RD in data(relu, 20, 40, 128))
    for z_by, codes_by in ((1, 0), (0, 1), (2, 3)):
        check(shim, moved(z_ND, z_by), moved(codes_KD, codes_by))
    check(shim, moved(z_ND, 1), moved(codes_KD, 1), "cosine")


@pytest.mark.parametrize(("n", "k"), [(0, 5), (1, 1), (1, 600), (200, 1), (129, 257)])
def test_odd_and_smallest_sizes(shim: Kernels, n: int, k: int) -> None:
    for metric in ("l2", "cosine"):
        check(shim, *data(CASES[0], n, k, 40), metric)


@pytest.mark.parametrize("z_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codes_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_may_differ_and_stored_values_count(
    shim: Kernels, z_dtype: torch.dtype, codes_dtype: torch.dtype
) -> None:
    z_ND, codes_KD = data(relu, 40, 200, 64)
    check(shim, z_ND.to(z_dtype), codes_KD.to(codes_dtype))


@pytest.mark.parametrize("tile", TILES)
def test_every_feature_may_overflow(shim: Kernels, tile: str) -> None:
    """Equal codes, and codes equal but for the last bits: more candidates than any list has places."""
    z_ND, codes_KD = data(all_equal, 140, 300, 40)
    assert check(shim, z_ND, codes_KD, tile=TILES[tile]) == (0, 140)
    generator = torch.Generator().manual_seed(3)
    noise_KD = torch.randn(codes_KD.shape, generator=generator)
    # The far code keeps the mean away, so that the others look the same in float16.
    codes_KD = codes_KD + 1e-7 * noise_KD
    codes_KD[7] = 1e6
    candidates, scanned = check(
        shim, z_ND + torch.randn(z_ND.shape, generator=generator), codes_KD, tile=TILES[tile]
    )
    assert (candidates, scanned) == (0, 140)


@pytest.mark.parametrize("tile", [*TILES, "hopper"])
def test_few_candidates_on_ordinary_data(shim: Kernels, tile: str) -> None:
    code = {**TILES, "hopper": TILE_HOPPER}[tile]
    for case in (CASES[0], relu, near_duplicates):
        candidates, scanned = check(shim, *data(case, 128, 500, 256), tile=code)
        assert scanned == 0
        assert candidates <= 2.5 * 128


def test_candidates_that_come_in_descending_order(shim: Kernels) -> None:
    """Each tile brings a nearer code: the lists must drop what is ruled out instead of running over."""
    z_ND = torch.zeros(5, 32)
    codes_KD = torch.linspace(2, 1, 3000)[:, None] * torch.ones(1, 32)
    _, scanned = check(shim, z_ND, codes_KD, tile=TILE_NARROW)
    assert scanned == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_values_that_are_not_finite_are_flagged(shim: Kernels, bad: float, metric: str) -> None:
    cosine = metric == "cosine"
    z_ND, codes_KD = data(CASES[0], 9, 20, 33)
    expected_N = search_in_blocks(z_ND, codes_KD, cosine, 256)[0]
    z_ND[4, 7] = bad
    found = shim.search(z_ND, codes_KD, cosine, shim.prepare(codes_KD, cosine), gather=True)
    others_N = torch.arange(9) != 4
    assert found.index_N[4] == -1
    assert found.sqdist_N[4].isnan()
    assert found.error_N[4].isnan()
    assert torch.equal(found.index_N[others_N], expected_N[others_N])
    assert found.error_N[others_N].isfinite().all()
    codes_KD[3, 2] = bad
    found = shim.search(z_ND, codes_KD, cosine, shim.prepare(codes_KD, cosine), gather=True)
    assert found.index_N.tolist() == [-1] * 9
    assert found.sqdist_N.isnan().all()
    assert found.error_N.isnan().all()


def test_cosine_of_zero_vectors(shim: Kernels) -> None:
    z_ND, codes_KD = data(CASES[0], 6, 8, 5)
    z_ND[2] = 0
    codes_KD[3] = 0
    check(shim, z_ND, codes_KD, "cosine")
    check(shim, -codes_KD[4:5], codes_KD[[3, 4]], "cosine")
    turned_1D = torch.tensor([[0.1, 0.99498743710662]])
    check(shim, turned_1D, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "cosine")


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_only_changed_codes_are_prepared_again(shim: Kernels, metric: str) -> None:
    cosine = metric == "cosine"
    z_ND, codes_KD = data(CASES[0], 50, 90, 40)
    prepared = shim.prepare(codes_KD, cosine)
    shadow = prepared.clone()
    codes_KD[[3, 80]] = z_ND[:2]
    codes_KD[17, 1] = torch.nan
    shim.prepare(codes_KD, cosine, prepared, torch.tensor([3, 17, 80]))
    assert not torch.equal(prepared, shadow)
    assert shim.search(z_ND, codes_KD, cosine, prepared).index_N.tolist() == [-1] * 50
    codes_KD[17] = 0.5
    shim.prepare(codes_KD, cosine, prepared, torch.tensor([17]))
    found = shim.search(z_ND, codes_KD, cosine, prepared)
    index_N, sqdist_N = search_in_blocks(z_ND, codes_KD, cosine, 256)
    assert index_N[:2].tolist() == [3, 80]
    assert torch.equal(found.index_N, index_N)
    assert torch.equal(found.sqdist_N, sqdist_N)


def test_a_code_that_outgrows_its_units_is_still_exact(shim: Kernels) -> None:
    """The centre and the units stay when single codes are prepared again; then nothing can be certified."""
    z_ND, codes_KD = data(CASES[0], 20, 60, 40)
    prepared = shim.prepare(codes_KD, False)
    z_ND[5] *= 1e12
    codes_KD[9] = z_ND[5] + 1
    shim.prepare(codes_KD, False, prepared, torch.tensor([9]))
    effort_2 = torch.zeros(2, dtype=torch.int64)
    found = shim.search(z_ND, codes_KD, False, prepared, effort_2=effort_2)
    assert found.index_N[5] == 9
    assert torch.equal(found.index_N, search_in_blocks(z_ND, codes_KD, False, 256)[0])
    assert effort_2.tolist() == [0, 20]
    shim.prepare(codes_KD, False, prepared)
    found = shim.search(z_ND, codes_KD, False, prepared, effort_2=effort_2)
    assert torch.equal(found.index_N, search_in_blocks(z_ND, codes_KD, False, 256)[0])


@pytest.mark.parametrize("tile", [*TILES, "hopper"])
@pytest.mark.parametrize("signs", ["random", "positive"])
def test_accumulation_stays_within_its_rate(shim: Kernels, tile: str, signs: str) -> None:
    """The shim's mma rounds towards zero after every eight products, which drifts most where all are positive."""
    code = {**TILES, "hopper": TILE_HOPPER}[tile]
    assert_accumulation_within_rate(shim, code, signs, torch.device("cpu"), 20, 70, (64, 512))


def assert_accumulation_within_rate(
    kernels: Kernels, tile: int, signs: str, device: torch.device, n: int, k: int, dims: tuple[int, ...]
) -> None:
    for dim in dims:
        g = torch.Generator().manual_seed(dim)
        features_ND = (
            torch.randn(n, dim, generator=g) * 2.0 ** torch.randint(-3, 14, (n, dim), generator=g)
        ).half()
        codes_KD = (
            torch.randn(k, dim, generator=g) * 2.0 ** torch.randint(-3, 14, (k, dim), generator=g)
        ).half()
        if signs == "positive":
            features_ND, codes_KD = features_ND.abs(), codes_KD.abs()
        found_NK = kernels.products(features_ND.to(device), codes_KD.to(device), tile).cpu().double()
        exact_NK = features_ND.double() @ codes_KD.double().T
        length_NK = features_ND.double().norm(dim=1)[:, None] * codes_KD.double().norm(dim=1)
        rate = 1.5 * dim * 2.0**-23  # accumulation_rate of csrc/prepare.h, without its reserve
        share = ((found_NK - exact_NK).abs() / length_NK).max() / rate
        assert 0 < share < 1, f"{share:.3g} of the rate at {dim} dimensions"


@pytest.mark.parametrize("n", [128, 1000, 6272, 25_088])
@pytest.mark.parametrize("k", [1000, 10_000, 100_000])
@pytest.mark.parametrize("dim", [512, 768, 1024, 1280, 2048])
def test_workspace_stays_below_64_mb(
    shim: Kernels, n: int, k: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQSA_SHIM_MULTIPROCESSORS", "132")
    for cosine in (False, True):
        for tile in (TILE_AUTO, TILE_HOPPER, TILE_ANY):
            assert 0 < shim.workspace_bytes(n, k, dim, cosine, tile) <= 64_000_000
        per_code = shim.prepared_bytes(k, dim, cosine) - 2 * k * dim - 8 * dim
        assert 0 < per_code <= 24 * k + 6000
