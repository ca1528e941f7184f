"""Which search kernels a device gets: the Hopper one only where a trial has shown on that device that it is right.

The Hopper kernel needs more than the source shows to be right: tensor maps, swizzles, the phases of barriers. So the
first search on a device of compute capability 9.0 also queues a trial: one hostile problem, searched by both kernels,
the answers compared on the device. Nothing waits for it. Searches take the mma.sync kernels, which give the same
bits, until its outcome has arrived in host memory. Later, a block of the Hopper kernel that waits in vain for a second
leaves its features to the rescan, so the answer is right; it also raises an alarm in host memory, and the next search
goes back to mma.sync.

Shapes: N = features, K = codes, D = feature dimension.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from model.codebook.kernels import TILE_ANY, TILE_AUTO, TILE_HOPPER, Kernels

VARIABLE = "VQSA_CODEBOOK_KERNEL"
"""Environment variable: "auto" (default), or "mma" or "hopper" to force either where the kernels are used."""

_PENDING = -1


class Variant(NamedTuple):
    """How one search is to be cut."""

    tile: int
    alarm_1: Tensor | None
    """int32, for `Kernels.search`."""


def variant_for(kernels: Kernels, device: torch.device, impl: str = "auto") -> Variant:
    """The variant for a search on this device.

    Args:
        impl: of `nearest_code`: "cuda" forces mma.sync and "hopper" the Hopper kernel, both over the variable.

    Raises:
        ValueError: the environment variable has another value.
    """
    wish = {"cuda": "mma", "hopper": "hopper"}.get(impl) or os.environ.get(VARIABLE, "auto")
    if wish not in ("auto", "mma", "hopper"):
        raise ValueError(f"{VARIABLE} is {wish!r}; choose 'auto', 'mma' or 'hopper'")
    if wish == "mma" or (wish == "auto" and kernels.capability(device) != 90):
        return Variant(TILE_AUTO, None)
    # A trial allocates, page-locked memory too, and would become a part of the graph: the next search outside has it.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    choice = _choices.get((kernels, device))
    if choice is None:
        if capturing:
            return Variant(TILE_HOPPER if wish == "hopper" else TILE_AUTO, None)
        choice = _choices[kernels, device] = Choice(kernels, device)
    if wish == "hopper":
        choice.heed_alarm()
        return Variant(TILE_HOPPER, choice.alarm_1)
    return Variant(TILE_ANY, choice.alarm_1) if choice.trusted(capturing) else Variant(TILE_AUTO, None)


class Choice:
    """What is known of the Hopper kernel on one device."""

    shape = (421, 20_000, 328)
    """N, K, D of the trial: several blocks of features, several code tiles to a block, and no size that is even."""

    def __init__(self, kernels: Kernels, device: torch.device) -> None:
        self._kernels, self._device = kernels, device
        self._trusted: bool | None = None
        self._warned = False
        # Page-locked, so that the device can write to it and the host can look without waiting.
        pinned = device.type == "cuda"
        self.alarm_1 = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        self._outcome_1 = torch.full((1,), _PENDING, dtype=torch.int32, pin_memory=pinned)
        self._queued = False

    def trusted(self, capturing: bool = False) -> bool:
        """Whether the Hopper kernel may be chosen now; queues the trial if there was none yet and may be one."""
        if not self._queued and not capturing:
            self._queued = True
            self._queue()
        if self._trusted is None and (outcome := int(self._outcome_1)) != _PENDING:
            self._trusted = outcome == 1
            if not self._trusted:
                self._warn_broken(
                    "its answers differ from those of the mma.sync kernels in a trial, or it stalls"
                )
        return bool(self._trusted) and not self.heed_alarm()

    def heed_alarm(self) -> bool:
        """Whether a search on this device has stalled; says so once, and the Hopper kernel is not chosen again."""
        if int(self.alarm_1) == 0:
            return False
        self._trusted = False
        self._warn_broken("a search with it stalled (the answer was found by the slower rescan and is right)")
        return True

    def _queue(self) -> None:
        """Queue the trial. Where that cannot be done, the caller's step goes on, with mma.sync for good."""
        try:
            self._outcome_1.copy_(self._agree(), non_blocking=True)
        except torch.OutOfMemoryError as error:
            self._trusted = False
            self._warn(
                f"the Hopper search kernel was not tried on {self._device}: memory ran out in its trial ({error}); "
                f"using the mma.sync kernels, which give the same answers. {VARIABLE}=mma avoids the trial"
            )
        except RuntimeError as error:  # a driver that is too old for tensor maps, a launch that is refused
            self._trusted = False
            self._warn_broken(str(error))

    def _warn_broken(self, why: str) -> None:
        self._warn(
            f"the Hopper search kernel does not work on {self._device}: {why}; using the mma.sync kernels. "
            f"Please report it with the output of `pytest -m gpu tests/test_codebook_gpu.py`; "
            f"{VARIABLE}=mma avoids the trial"
        )

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    @torch.no_grad()
    def _agree(self) -> Tensor:
        """Search one problem with both kernels: int32 (1,) on the device, 1 if the Hopper kernel is right."""
        z_ND, codes_KD = hostile_problem(*self.shape, self._device)
        prepared = self._kernels.prepare(codes_KD, False)
        index, sqdist, rescanned, alarms = [], [], [], []
        for tile in (TILE_AUTO, TILE_HOPPER):
            effort_2 = torch.zeros(2, dtype=torch.int64, device=self._device)
            alarm_1 = torch.zeros(1, dtype=torch.int32, device=self._device)
            found = self._kernels.search(
                z_ND, codes_KD, False, prepared, tile=tile, effort_2=effort_2, alarm_1=alarm_1
            )
            index.append(found.index_N)
            sqdist.append(found.sqdist_N)
            rescanned.append(effort_2[1:])
            alarms.append(alarm_1)
        agree_1 = (index[0] == index[1]).all() & (sqdist[0] == sqdist[1]).all() & (alarms[1] == 0)
        # One that leaves everything to the rescan is right but of no use.
        return (agree_1 & (rescanned[1] <= rescanned[0] + len(z_ND) // 8)).int()


_choices: dict[tuple[Kernels, torch.device], Choice] = {}


def hostile_problem(n: int, k: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features of norms over 12 decades, a far common offset, codes in near-duplicate pairs, some of them equal."""
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device)
    codes_KD = random(k, d)
    codes_KD[k // 2 : k // 2 * 2] = codes_KD[: k // 2] * (1 + 1e-3 * random(k // 2, d))
    codes_KD[1::97] = codes_KD[0]
    z_ND = codes_KD[torch.randint(k, (n,), generator=generator, device=device)] + 0.1 * random(n, d)
    z_ND[::3] *= torch.logspace(-6, 6, len(z_ND[::3]), device=device)[:, None]
    return z_ND + 50, codes_KD + 50
