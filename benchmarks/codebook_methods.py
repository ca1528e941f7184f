"""The ways to search a codebook that benchmarks/codebook.py compares: ours, plain torch, libraries where installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.codebook import PreparedCodebook, nearest_code, quantize
from model.codebook.kernels import APART, TILE_AUTO, kernels_for
from model.codebook.segment_sum import segment_sum_of_differences

# Shapes: N = features, K = codes, D = feature dimension.


@contextmanager
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def half_product(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """float32 products of half matrices; on a CPU, which has none, of their float32 copies."""
    if z_ND.is_cuda:
        return torch.mm(z_ND, codes_KD.T, out_dtype=torch.float32)
    return z_ND.float() @ codes_KD.float().T


def methods(z_ND: Tensor, codes_KD: Tensor) -> dict[str, Callable[[], Any]]:
    """Name to call; one whose result starts with an index (N,) of codes is also checked."""
    half_z_ND, half_codes_KD = z_ND.half(), codes_KD.half()
    half_square_K = 0.5 * codes_KD.square().sum(1)
    prepared = PreparedCodebook(codes_KD)
    k = len(codes_KD)
    code_ND, index_N = quantize(z_ND, codes_KD, prepared=prepared)[:2]
    scale = torch.ones((), dtype=torch.float64, device=z_ND.device)
    z_grad_ND, codes_grad_KD = z_ND.clone().requires_grad_(), codes_KD.clone().requires_grad_()

    def backward() -> None:
        found = quantize(z_grad_ND, codes_grad_KD)
        (found.vq_loss + found.commit_loss + found.quantised_ND.sum()).backward()
        z_grad_ND.grad = codes_grad_KD.grad = None

    def half_argmin() -> Tensor:
        return (half_square_K - half_product(half_z_ND, half_codes_KD)).argmin(1)

    def half_forward() -> tuple[Tensor, ...]:
        index_N = half_argmin()
        code_ND = codes_KD[index_N]
        return (
            index_N,
            z_ND + (code_ND - z_ND),
            (code_ND - z_ND).square().mean(),
            (z_ND - code_ND).square().mean(),
        )

    def half_backward() -> None:
        with torch.no_grad():
            index_N = half_argmin()
        code_ND = codes_grad_KD[index_N]
        vq_loss = (code_ND - z_ND).square().mean()
        commit_loss = (z_grad_ND - code_ND.detach()).square().mean()
        through_ND = z_grad_ND + (code_ND - z_grad_ND).detach()
        (vq_loss + commit_loss + through_ND.sum()).backward()
        z_grad_ND.grad = codes_grad_KD.grad = None

    def float_argmin() -> Tensor:
        return torch.addmm(half_square_K, z_ND, codes_KD.T, alpha=-1).argmin(1)

    def tf32_argmin() -> Tensor:
        with tf32():
            return float_argmin()

    found: dict[str, Callable[[], Any]] = {
        "ours: search, codebook prepared": lambda: nearest_code(z_ND, codes_KD, prepared=prepared),
        "ours: forward, codebook prepared": lambda: quantize(z_ND, codes_KD, prepared=prepared)[1:],
        "ours: forward": lambda: quantize(z_ND, codes_KD)[1:],
        "ours: forward and backward": backward,
        "ours: prepare": prepared.refresh,
        "ours: codebook gradient": lambda: segment_sum_of_differences(code_ND, z_ND, scale, index_N, k),
        "index_add of the differences": lambda: torch.zeros_like(codes_KD).index_add_(
            0, index_N, code_ND - z_ND
        ),
        "torch: search (impl='torch')": lambda: nearest_code(z_ND, codes_KD, impl="torch"),
        "read the half codes once": lambda: half_codes_KD.view(-1).amax(),
        "half GEMM": lambda: half_product(half_z_ND, half_codes_KD),
        "half GEMM + argmin": lambda: (half_argmin(),),
        "half GEMM + argmin + gather + losses": half_forward,
        "half GEMM + argmin + gather + losses, and backward": half_backward,
        "float32 addmm + argmin": lambda: (float_argmin(),),
        "TF32 addmm + argmin": lambda: (tf32_argmin(),),
        "float32 cdist + argmin": lambda: (torch.cdist(z_ND, codes_KD).argmin(1),),
    }
    if z_ND.is_cuda and torch.cuda.get_device_capability() == (9, 0):
        for name, impl in (("ours: search, mma.sync", "cuda"), ("ours: search, Hopper variant", "hopper")):
            found[name] = partial(nearest_code, z_ND, codes_KD, impl=impl, prepared=prepared)
    fused = kernels_for(z_ND, "auto")
    if fused is not None:
        ready = fused.prepare(codes_KD, False)
        before = fused.together()
        fused.search(z_ND, codes_KD, False, ready)
        if fused.together() > before:
            for name, tile in (("in one launch", TILE_AUTO), ("in a launch of its own", TILE_AUTO + APART)):
                found[f"ours: mma.sync, converted {name}"] = partial(
                    fused.search, z_ND, codes_KD, False, ready, tile=tile
                )
    return found | installed_methods(z_ND, codes_KD)


def vector_quantize_pytorch(z_ND: Tensor, codes_KD: Tensor) -> Callable[[], Any]:
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=z_ND.shape[1], codebook_size=len(codes_KD), decay=0.99).to(z_ND.device).eval()
    layer.codebook = codes_KD
    return lambda: (layer(z_ND[None])[1][0],)


def faiss_flat(z_ND: Tensor, codes_KD: Tensor) -> Callable[[], Any]:
    import faiss
    import faiss.contrib.torch_utils

    dim = z_ND.shape[1]
    if not z_ND.is_cuda:
        flat = faiss.IndexFlatL2(dim)
    elif hasattr(faiss, "StandardGpuResources"):
        flat = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), dim)
    else:
        raise ImportError("faiss is installed without its GPU part")
    flat.add(codes_KD)
    return lambda: (flat.search(z_ND, 1)[1][:, 0],)


def installed_methods(z_ND: Tensor, codes_KD: Tensor) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    makers = {"vector-quantize-pytorch": vector_quantize_pytorch, "faiss flat L2": faiss_flat}
    for name, make in makers.items():
        try:
            found[name] = make(z_ND, codes_KD)
        except ImportError as error:
            print(f"  {name}: not measured: {error}")
        except Exception as error:
            found[name] = partial(fail, error)
    return found


def fail(error: Exception) -> None:
    """Raise what the making of a method raised, where its row is measured."""
    raise error
