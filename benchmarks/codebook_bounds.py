"""What the codebook search is held to, and the arithmetic and memory floors of the device at hand."""

from __future__ import annotations

from typing import Any, NamedTuple

# Shapes: N = features, K = codes, D = feature dimension.


class Rates(NamedTuple):
    """What a device can do at most."""

    device: str
    half_flop_s: float
    float_flop_s: float
    bytes_s: float


RATES = (Rates("H200", 790e12, 67e12, 4.3e12), Rates("H100", 790e12, 67e12, 3.0e12))
"""Half products and bytes as measured on such devices (the H100's with HBM3), float32 by the data sheet."""


def rates_of(name: str) -> Rates:
    """Rates of the device with this name; of an H200 for any other, which the result's "device" says."""
    return next((rates for rates in RATES if rates.device in name), RATES[0])


def floors_us(n: int, k: int, d: int, rates: Rates) -> dict[str, float]:
    """Arithmetic and memory floors in microseconds."""
    flop = 2.0 * n * k * d
    return {
        "half_product": round(1e6 * flop / rates.half_flop_s, 1),
        "float_product": round(1e6 * flop / rates.float_flop_s, 1),
        "read_half_codes": round(1e6 * 2 * k * d / rates.bytes_s, 1),
        "write_and_read_scores": round(1e6 * 8 * n * k / rates.bytes_s, 1),
    }


SEARCH, FORWARD, FORWARD_PREPARED = (
    "ours: search, codebook prepared",
    "ours: forward",
    "ours: forward, codebook prepared",
)
GEMM, CHAIN, CDIST, READ = (
    "half GEMM",
    "half GEMM + argmin + gather + losses",
    "float32 cdist + argmin",
    "read the half codes once",
)


class Bound(NamedTuple):
    """One line of what must hold: median of `above` over median of `below`."""

    above: str
    below: str
    """A method, or "floor: " and the name of a floor."""

    limit: float
    at_least: bool = False
    size: tuple[int, int, int] | None = None
    """N, K, D; None for every size."""


MAIN, FEW = (6272, 10_000, 2048), (128, 100_000, 2048)
BOUNDS = (
    Bound(FORWARD_PREPARED, GEMM, 1.15, size=MAIN),
    Bound(FORWARD, GEMM, 1.30, size=MAIN),
    Bound(CDIST, FORWARD, 8.0, at_least=True, size=MAIN),
    Bound(SEARCH, "floor: read_half_codes", 1.5, size=FEW),
    Bound(SEARCH, READ, 1.5, size=FEW),
    Bound(FORWARD_PREPARED, CHAIN, 1.0),
)
"""The chain's half codes and their norms are at hand too, so ours with the codebook prepared stands beside it."""


def ratio(bound: Bound, rows: dict[str, Any], floors: dict[str, float]) -> float | None:
    """What the bound limits, at one size; None where a method was not measured."""

    def median_ms(name: str) -> float | None:
        if name.startswith("floor: "):
            return floors[name.removeprefix("floor: ")] / 1e3
        return rows[name]["ms"]["p50"] if "ms" in rows.get(name, {}) else None

    above, below = median_ms(bound.above), median_ms(bound.below)
    return round(above / below, 3) if above is not None and below else None


def verdicts(sizes: list[dict[str, Any]], gpu: bool) -> list[dict[str, Any]]:
    """Every bound at every size that it is for, and that ours found the nearest code wherever that was asked.

    Args:
        sizes: the result's, each with n, k, d, floors_us and methods.
        gpu: whether they were measured on one; the bounds are of no other device.

    Returns:
        For each: what, at (N, K, D), ratio or percentage, limit, and holds: None where it was not measured, or not on
        a GPU.
    """
    by_size = {(size["n"], size["k"], size["d"]): size for size in sizes}
    found = []
    for bound in BOUNDS:
        for at in [bound.size] if bound.size else list(by_size):
            size = by_size.get(at)
            value = ratio(bound, size["methods"], size["floors_us"]) if size else None
            holds = None
            if value is not None and gpu:
                holds = value >= bound.limit if bound.at_least else value <= bound.limit
            limit = f"{'>=' if bound.at_least else '<='} {bound.limit}"
            found.append(
                {
                    "what": f"{bound.above} / {bound.below}",
                    "at": at,
                    "value": value,
                    "limit": limit,
                    "holds": holds,
                }
            )
    for at, size in by_size.items():
        wrong = [
            row["wrong_pct"]
            for name, row in size["methods"].items()
            if name.startswith("ours") and "wrong_pct" in row
        ]
        most = max(wrong, default=None)
        holds = None if most is None else most == 0
        found.append(
            {"what": "wrong codes of ours, %", "at": at, "value": most, "limit": "<= 0", "holds": holds}
        )
    return found


def told(verdict: dict[str, Any]) -> str:
    """One line for the screen."""
    unjudged = "not measured" if verdict["value"] is None else "not judged"
    word = {True: "holds", False: "MISSED", None: unjudged}[verdict["holds"]]
    value = "" if verdict["value"] is None else verdict["value"]
    return f"{word:12s} {value!s:>8} {verdict['limit']:>8}  {verdict['what']} at {' x '.join(map(str, verdict['at']))}"
