"""Features and codebooks that are hard to search exactly.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gaussian(generator: torch.Generator, rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim, generator=generator)


def relu(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return gaussian(g, n, d).relu(), gaussian(g, k, d).relu()


def uniform_1n(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return gaussian(g, n, d).relu(), (torch.rand(k, d, generator=g) * 2 - 1) / k


def centres(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z_ND = gaussian(g, n, d).relu()
    return z_ND, z_ND[torch.randint(n, (k, 4), generator=g)].mean(1)


def duplicates(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    distinct_ED = gaussian(g, max(1, k // 3), d)
    return gaussian(g, n, d), distinct_ED[torch.randint(len(distinct_ED), (k,), generator=g)]


def near_duplicates(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    codes_KD = gaussian(g, k, d)
    half = k // 2
    codes_KD[half : 2 * half] = codes_KD[:half] * (1 + 1e-3 * gaussian(g, half, d))
    return codes_KD[torch.randint(k, (n,), generator=g)] + 0.1 * gaussian(g, n, d), codes_KD


def last_bit_duplicates(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Codes that differ in the last bit of one value: float32 sums cannot tell them apart."""
    codes_KD = gaussian(g, 1, d).repeat(k, 1)
    where_K = torch.randint(d, (k,), generator=g)
    codes_KD[torch.arange(k), where_K] = torch.nextafter(
        codes_KD[torch.arange(k), where_K], torch.tensor(9.0)
    )
    return gaussian(g, n, d), codes_KD


def collapsed(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    centre_CD = gaussian(g, 100, d).relu()
    codes_KD = centre_CD[torch.arange(k) % 100]
    codes_KD[k // 2 :] += 1e-7 * gaussian(g, k - k // 2, d)
    return gaussian(g, n, d).relu(), codes_KD


def offset(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    shift_D = 1000 * gaussian(g, 1, d)
    return gaussian(g, n, d) + shift_D, gaussian(g, k, d) + shift_D


def norms(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z_ND, codes_KD = gaussian(g, n, d), gaussian(g, k, d)
    return z_ND * torch.logspace(-20, 15, n)[:, None], codes_KD * torch.logspace(-20, 15, k)[:, None]


def norms_of_features(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return gaussian(g, n, d) * torch.logspace(-20, 15, n)[:, None], gaussian(g, k, d)


def ends_of_range(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    codes_KD = gaussian(g, k, d).clamp(-1, 1)
    codes_KD[::2] *= 3e38
    codes_KD[1::2] *= 1e-44
    return codes_KD[torch.randint(k, (n,), generator=g)].roll(1, 1), codes_KD


def beside_huge(g: torch.Generator, n: int, k: int, d: int, scale: float) -> tuple[Tensor, Tensor]:
    """Codes ±huge and ±tiny about a centre of zero, and features near it that only the tiny ones can win.

    In units in which the huge ones are 1, ½‖e‖² of the tiny ones is close to the end of float32's range: it rounds
    to two numbers that lie farther apart than the products with features.
    """
    norm_K1 = 1 + 2.0**-10 * torch.tensor([0.245, 0.255])[torch.randint(2, (k, 1), generator=g)]
    codes_KD = gaussian(g, k, d)
    codes_KD[:, 0] = 0
    codes_KD = 2.0**-69 * norm_K1 * torch.nn.functional.normalize(codes_KD, dim=1)
    huge = k // 8 // 2 * 2
    codes_KD[:huge] = 0
    codes_KD[:huge, 0] = 1
    codes_KD[1::2] = -codes_KD[: k // 2 * 2 : 2]
    z_ND = 2.0**-82 * torch.nn.functional.normalize(gaussian(g, n, d), dim=1)
    z_ND *= torch.logspace(-2, 1, n, base=2)[:, None]
    return scale * z_ND, scale * codes_KD


def beside_one(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return beside_huge(g, n, k, d, 1.0)


def beside_million(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return beside_huge(g, n, k, d, 2.0**20)


def beside_quadrillion(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return beside_huge(g, n, k, d, 2.0**50)


def all_equal(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.ones(n, d), torch.ones(k, d)


Case = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor]]
CASES: list[Case] = [
    lambda g, n, k, d: (gaussian(g, n, d), gaussian(g, k, d)),
    relu, uniform_1n, centres, duplicates, near_duplicates, last_bit_duplicates, collapsed,
    offset, norms, norms_of_features, ends_of_range, beside_one, beside_million, beside_quadrillion,
]  # fmt: skip
NAMES = ["gaussian", *(case.__name__ for case in CASES[1:])]


def data(case: Case, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return case(torch.Generator().manual_seed(7), n, k, d)
