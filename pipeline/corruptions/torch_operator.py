"""The torch front: corrupt, draw and apply for uint8 image tensors on CPU and CUDA.

Shapes: B = images, H = height, W = width; the last axis of an image is RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.corruptions import core, frost
from pipeline.corruptions.fields import field_parts, noise_parts, pack, unpack
from pipeline.corruptions.kinds import KINDS, constants_id, flavour_id, kind_number

_PerSampleInt = int | Sequence[int] | np.ndarray | Tensor
_Kind = str | int | Sequence[str | int] | np.ndarray | Tensor


def _check_images(images: Tensor, caller: str) -> Tensor:
    """Return the images as contiguous (B, H, W, 3)."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{caller} needs a torch uint8 tensor, got {type(images).__name__}; use torch.from_numpy"
        )
    if images.dtype != torch.uint8:
        raise TypeError(
            f"{caller} needs uint8 images in 0..255, got {images.dtype}; corrupt before normalising"
        )
    if images.ndim not in (3, 4) or images.shape[-1] != 3:
        hint = ""
        if images.ndim in (3, 4) and images.shape[-3] == 3:
            hint = "; this looks like channels first: use .movedim(-3, -1)"
        raise ValueError(f"{caller} needs images (H, W, 3) or (B, H, W, 3), got {tuple(images.shape)}{hint}")
    if images.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{caller} runs on cpu and cuda, got images on {images.device}")
    if images.shape[-3] < 32 or images.shape[-2] < 32:
        raise ValueError(
            f"{caller} needs images of at least 32 x 32 pixels, got {images.shape[-3]} x {images.shape[-2]}"
        )
    return images.reshape(-1, *images.shape[-3:]).contiguous()


def _kind_number(kind: str | int) -> int:
    if isinstance(kind, str):
        return kind_number(kind)
    number = int(kind)
    if not 0 <= number < len(KINDS):
        raise ValueError(f"unknown corruption number {number}; it must be in 0..{len(KINDS) - 1} (KINDS)")
    return number


def _per_sample(value: object, count: int, name: str) -> list[int]:
    """Spread a scalar over the batch, or take one number per image."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} must be on the CPU, got {value.device}: "
                "the host plans, and reading it back would wait"
            )
        if value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {value.dtype}")
        value = value.numpy()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integers, got {value.dtype}")
        value = value.tolist()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return [int(value)] * count
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in value
    ):
        raise TypeError(f"{name} must be an integer or one per image, got {value!r}")
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} images")
    return [int(v) for v in value]


def _kinds(kind: _Kind, count: int) -> list[int]:
    if isinstance(kind, str):
        return [_kind_number(kind)] * count
    if isinstance(kind, (list, tuple)):
        if len(kind) != count:
            raise ValueError(f"kind has {len(kind)} values for {count} images")
        return [_kind_number(k) for k in kind]
    numbers = _per_sample(kind, count, "kind")
    for number in set(numbers):
        _kind_number(number)
    return numbers


def _severities(severity: _PerSampleInt, kinds: Sequence[int]) -> list[int]:
    severities = _per_sample(severity, len(kinds), "severity")
    for i, (number, kind) in enumerate(zip(severities, kinds, strict=True)):
        if kind != 0 and not 1 <= number <= 5:
            raise ValueError(f"severity must be in 1..5, got {number} for image {i}")
    return severities


def _keys(key: _PerSampleInt, count: int) -> list[int]:
    keys = _per_sample(key, count, "key")
    for value in keys:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"key must fit in 64 bits, got {value}")
    return [value % 2**64 for value in keys]


def _signed(key: int) -> int:
    """The same 64 bits as int64: torch integers are signed."""
    return key - 2**64 if key >= 2**63 else key


def _orders(images_BHWC: Tensor, out_BHWC: Tensor, plan_3B: Tensor) -> np.ndarray:
    """Build the core's work orders for a contiguous batch."""
    count, height, width, _ = images_BHWC.shape
    orders = np.zeros(count, core.IMAGE_DTYPE)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(height * width * 3)
    orders["in"] = np.uint64(images_BHWC.data_ptr()) + offsets
    orders["out"] = np.uint64(out_BHWC.data_ptr()) + offsets
    plan = plan_3B.numpy()
    orders["height"] = height
    orders["width"] = width
    orders["kind"] = plan[0]
    orders["severity"] = plan[1]
    orders["key"] = plan[2].view(np.uint64)
    return orders


def _run(orders: np.ndarray, device: torch.device, mode: int, flavour: int, constants: int) -> None:
    if len(orders) == 0:
        return
    frost.ensure_loaded(orders["kind"])
    if device.type == "cpu":
        core.run_cpu(orders, mode, flavour, constants, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        size = core.workspace_cuda(orders, mode, flavour, constants)
        stream = torch.cuda.current_stream(device)
        # From torch's caching allocator: stream ordered, so it may be freed before the kernels end.
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        core.run_cuda(orders, mode, flavour, constants, workspace.data_ptr(), size, stream.cuda_stream)


@torch.library.custom_op("vqsa::corrupt", mutates_args=())
def _corrupt(images_BHWC: Tensor, plan_3B: Tensor, flavour: int, constants: int) -> Tensor:
    """Corrupt a contiguous uint8 batch; plan_3B int64 on the CPU: kind, severity, key bits."""
    images_BHWC = images_BHWC.contiguous()
    out_BHWC = torch.empty_like(images_BHWC, memory_format=torch.contiguous_format)
    _run(
        _orders(images_BHWC, out_BHWC, plan_3B.contiguous()),
        images_BHWC.device,
        core.MODE_CORRUPT,
        flavour,
        constants,
    )
    return out_BHWC


@_corrupt.register_fake
def _(images_BHWC: Tensor, plan_3B: Tensor, flavour: int, constants: int) -> Tensor:
    return torch.empty_like(images_BHWC, memory_format=torch.contiguous_format)


def corrupt(
    images_u8: Tensor,
    kind: _Kind,
    severity: _PerSampleInt,
    key: _PerSampleInt,
    flavour: str = "hendrycks",
    constants: str = "auto",
) -> Tensor:
    """Apply ImageNet-C corruptions to images, one kind, severity and key for all or one per image.

    Args:
        images_u8: (H, W, 3) or (B, H, W, 3), uint8, RGB in 0..255, on CPU or CUDA; H, W >= 32; B may be 0.
        kind: a name or number of KINDS, or one per image (numbers may come as a CPU tensor).
        severity: 1..5, or one per image; ignored for "identity".
        key: uint64 that names the random draw, or one per image (int64 tensors: the same bits). The
            result depends on the image, kind, severity and key only: not on the batch, the image's
            place in it, threads or device.
        flavour: "hendrycks" as ImageNet-C was made, "bethge" as PyPI imagecorruptions does it; they
            differ in frost, elastic_transform and snow; at other sizes than 224 px pixelate and
            motion_blur may differ too.
        constants: "imagenet", "tiny_imagenet" or "cifar10"; "auto" takes the set of the image's
            size, tiny_imagenet for 64 x 64, cifar10 for 32 x 32, imagenet otherwise.

    Returns:
        uint8 tensor of the same shape and device. On CUDA it is queued on the current stream.

    Raises:
        TypeError: images are not a uint8 tensor, or kind, severity or key are no integers.
        ValueError: unknown kind, flavour or constants, severity outside 1..5, wrong shape, image
            under 32 pixels, or a per-image list of the wrong length.
        FileNotFoundError: frost without its textures.
        MemoryError: no memory for the scratch of the CPU's threads.
    """
    batch_BHWC = _check_images(images_u8, "corrupt")
    count = batch_BHWC.shape[0]
    kinds = _kinds(kind, count)
    severities = _severities(severity, kinds)
    keys = _keys(key, count)
    flavour_number, constants_number = flavour_id(flavour), constants_id(constants)
    plan_3B = torch.tensor([kinds, severities, [_signed(k) for k in keys]], dtype=torch.int64).reshape(
        3, count
    )
    out: Tensor = _corrupt(batch_BHWC, plan_3B, flavour_number, constants_number)
    return out.reshape(images_u8.shape)


def jpeg_pass(images_u8: Tensor, quality: int = 85) -> Tensor:
    """Encode and decode images as JPEG (4:2:0, as Pillow does), the last step of ImageNet-C's files.

    Args:
        images_u8: (H, W, 3) or (B, H, W, 3), uint8, on CPU or CUDA.
        quality: 1..100; ImageNet-C's files were saved with 85.

    Returns:
        uint8 tensor of the same shape, equal to Pillow's decoding of Pillow's file.

    Raises:
        TypeError, ValueError: as corrupt; quality outside 1..100.
    """
    batch_BHWC = _check_images(images_u8, "jpeg_pass")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ValueError(f"quality must be an integer in 1..100, got {quality!r}")
    plan_3B = torch.tensor([[core.JPEG_QUALITY_KIND], [quality], [0]]).repeat(1, batch_BHWC.shape[0])
    out: Tensor = _corrupt(batch_BHWC, plan_3B, 0, 0)
    return out.reshape(images_u8.shape)


def _single_order(kind: int, severity: int, key: int, height: int, width: int) -> np.ndarray:
    orders = np.zeros(1, core.IMAGE_DTYPE)
    orders["kind"], orders["severity"], orders["key"] = kind, severity, key
    orders["height"], orders["width"] = height, width
    return orders


def draw(
    kind: str | int,
    severity: int,
    key: int,
    height: int,
    width: int,
    flavour: str = "hendrycks",
    constants: str = "auto",
    device: str | torch.device = "cpu",
    noise: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Draw the random fields of a corruption, which do not depend on the image.

    Args:
        kind, severity, key: one each; see corrupt.
        height, width: of the image, >= 32.
        flavour, constants: see corrupt.
        device: where to draw.
        noise: raw noise to shape instead of the key's, for comparison with another generator: the
            parts that fields.noise_parts names. Only for snow, fog, elastic_transform and spatter.

    Returns:
        The fields by name (fields.field_parts), on `device`; empty for kinds that draw nothing.

    Raises:
        TypeError, ValueError: as corrupt; noise with wrong names, shapes, or for a kind without any.
    """
    number = _kind_number(kind)
    severity = _severities(severity, [number])[0] if number else 1
    orders = _single_order(number, severity, _keys(key, 1)[0], height, width)
    flavour_number, constants_number = flavour_id(flavour), constants_id(constants)
    if height < 32 or width < 32:
        raise ValueError(f"draw needs a size of at least 32 x 32 pixels, got {height} x {width}")
    where = torch.device(device)
    size = (number, severity, flavour_number, constants_number, height, width)
    words = core.library().vqsa_field_words(*size)
    fields = torch.zeros(words, dtype=torch.int32, device=where)
    orders["fields"] = fields.data_ptr()
    raw: Tensor | None = None
    if noise is not None:
        raw_words = core.library().vqsa_noise_words(*size)
        parts = noise_parts(KINDS[number], height, width, raw_words)
        raw = pack(noise, parts, raw_words, where, f"noise of {KINDS[number]}")
        orders["noise"] = raw.data_ptr()
    _run(orders, where, core.MODE_DRAW, flavour_number, constants_number)
    return unpack(fields, field_parts(KINDS[number], height, width, words))


def apply(
    images_u8: Tensor,
    fields: dict[str, Tensor] | Sequence[dict[str, Tensor]],
    kind: str | int,
    severity: int,
    flavour: str = "hendrycks",
    constants: str = "auto",
) -> Tensor:
    """Corrupt images with fields that were drawn before: the second half of corrupt.

    apply(x, draw(k, s, key, H, W), k, s) equals corrupt(x, k, s, key) bit for bit.

    Args:
        images_u8: (H, W, 3) or (B, H, W, 3), uint8, on CPU or CUDA.
        fields: what draw returned for this kind, severity and size, on the images' device; one for
            all images, or one per image.
        kind, severity, flavour, constants: one each; see corrupt.

    Returns:
        uint8 tensor of the same shape and device.

    Raises:
        TypeError, ValueError: as corrupt; fields with wrong names, shapes, dtypes or device.
    """
    batch_BHWC = _check_images(images_u8, "apply")
    count, height, width, _ = batch_BHWC.shape
    number = _kind_number(kind)
    severity = _severities(severity, [number])[0] if number else 1
    flavour_number, constants_number = flavour_id(flavour), constants_id(constants)
    per_image = [fields] * count if isinstance(fields, dict) else list(fields)
    if len(per_image) != count:
        raise ValueError(f"apply got {len(per_image)} fields for {count} images")
    words = core.library().vqsa_field_words(number, severity, flavour_number, constants_number, height, width)
    parts = field_parts(KINDS[number], height, width, words)
    packed: dict[int, Tensor] = {}
    for one in per_image:
        if id(one) not in packed:
            packed[id(one)] = pack(one, parts, words, batch_BHWC.device, f"fields of {KINDS[number]}")
    out_BHWC = torch.empty_like(batch_BHWC)
    plan_3B = torch.tensor([[number], [severity], [0]]).repeat(1, count)
    orders = _orders(batch_BHWC, out_BHWC, plan_3B)
    orders["fields"] = [packed[id(one)].data_ptr() for one in per_image]
    _run(orders, batch_BHWC.device, core.MODE_APPLY, flavour_number, constants_number)
    return out_BHWC.reshape(images_u8.shape)
