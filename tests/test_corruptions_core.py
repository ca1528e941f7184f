"""The corruption core: Philox, determinism, and that every way of running gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.corruptions import KINDS, apply, available_kinds, core, corrupt, draw, frost, kind_id
from pipeline.corruptions.kinds import constants_id, flavour_id

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(32, 32), (33, 47), (64, 64), (224, 224), (41, 331)]


@pytest.fixture(scope="module")
def kinds() -> tuple[str, ...]:
    """The kinds that can run here: without frost where its textures are absent."""
    return tuple(k for k in available_kinds() if k != "frost" or frost.found())


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A smooth colour gradient with flat areas, edges and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 9.0 + y / 5.0)], axis=-1)
    image[: height // 4, : width // 4] = 255
    image[height // 2 : height // 2 + 5] = 0
    image[:, width // 2 : width // 2 + 9] = 130
    image[-height // 4 :, -width // 4 :] += rng.normal(0, 40, image[-height // 4 :, -width // 4 :].shape)
    return torch.from_numpy(np.clip(image, 0, 255).astype(np.uint8))


def run(
    images: list[torch.Tensor], kind: str, severity: int, keys: list[int], **options: object
) -> list[torch.Tensor]:
    """Run the core on images of any sizes, with a chosen implementation."""
    outs = [torch.empty_like(image) for image in images]
    orders = np.zeros(len(images), core.IMAGE_DTYPE)
    orders["in"] = [image.data_ptr() for image in images]
    orders["out"] = [out.data_ptr() for out in outs]
    orders["key"] = keys
    orders["height"] = [image.shape[0] for image in images]
    orders["width"] = [image.shape[1] for image in images]
    orders["kind"] = kind_id(kind)
    orders["severity"] = severity
    flavour = str(options.pop("flavour", "hendrycks"))
    frost.ensure_loaded([kind_id(kind)])
    threads = int(options.pop("threads", 1))  # type: ignore[call-overload]
    core.run_cpu(orders, core.MODE_CORRUPT, flavour_id(flavour), constants_id("auto"), threads, **options)  # type: ignore[arg-type]
    return outs


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], want: tuple[int, ...]) -> None:
    got = core.philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert tuple(got.tolist()) == want


def test_names_come_without_torch_or_dali() -> None:
    code = (
        "import sys, pipeline.corruptions as c; assert c.KINDS[0] == 'identity' and len(c.KINDS) == 20;"
        "assert not {'torch', 'nvidia.dali', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kinds_in_imagenet_c_order() -> None:
    assert KINDS.index("gaussian_noise") == 1
    assert KINDS.index("jpeg_compression") == 15
    assert KINDS.index("saturate") == 19


@pytest.mark.parametrize("size", SIZES)
def test_every_form_gives_the_same_bytes(kinds: tuple[str, ...], size: tuple[int, int]) -> None:
    """Instruction sets, CUDA's tile form emulated, draw + apply, batch place and threads."""
    images = [picture(*size, seed=s) for s in range(3)]
    for kind in kinds:
        for severity in (1, 2, 3, 4, 5) if size[0] < 64 else (2, 5):
            for flavour in ("hendrycks", "bethge"):
                keys = [7, 2**63 + 5, 123456789]
                best = run(images, kind, severity, keys, flavour=flavour)
                what = f"{kind} {severity} {flavour} {size}"
                for isa in ("generic", "v3"):
                    try:
                        other = run(images[:1], kind, severity, keys[:1], flavour=flavour, isa=isa)
                    except ValueError as e:
                        assert "instruction set" in str(e)  # noqa: PT017
                        continue
                    assert torch.equal(best[0], other[0]), f"{what}: {isa}"
                emulated = run(
                    images[1:2], kind, severity, keys[1:2], flavour=flavour, impl=core.IMPL_EMULATED
                )
                assert torch.equal(best[1], emulated[0]), f"{what}: emulated CUDA"
                assert torch.equal(
                    run(images[::-1], kind, severity, keys[::-1], flavour=flavour, threads=3)[0], best[2]
                ), what
                two = apply(
                    images[2],
                    draw(kind, severity, keys[2], *size, flavour=flavour),
                    kind,
                    severity,
                    flavour=flavour,
                )
                assert torch.equal(two, best[2]), f"{what}: draw + apply"
                assert best[0].shape == images[0].shape


def test_key_decides_the_draw(kinds: tuple[str, ...]) -> None:
    image = picture(48, 48)
    undrawn = {
        "identity",
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
        "gaussian_blur",
        "saturate",
    }
    for kind in kinds:
        a, b, c = corrupt(image.expand(3, -1, -1, -1), kind, 5, [1, 1, 2])
        assert torch.equal(a, b)
        if kind not in ("frost",):  # two keys may take the same crop
            assert torch.equal(a, c) == (kind in undrawn), kind
        if kind != "identity":
            assert not torch.equal(a, image), kind


def test_mixed_batch_equals_single_images(kinds: tuple[str, ...]) -> None:
    images = torch.stack([picture(40, 52, seed=s) for s in range(len(kinds))])
    severities = [s % 5 + 1 for s in range(len(kinds))]
    keys = [1000 + s for s in range(len(kinds))]
    batch = corrupt(images, list(kinds), severities, keys)
    for i, kind in enumerate(kinds):
        assert torch.equal(batch[i], corrupt(images[i], kind, severities[i], keys[i])), kind


def test_keys_are_uint64() -> None:
    image = picture(32, 32)
    want = corrupt(image, "gaussian_noise", 3, 2**64 - 1)
    assert torch.equal(corrupt(image, "gaussian_noise", 3, -1), want)
    assert torch.equal(corrupt(image, "gaussian_noise", 3, np.array([2**64 - 1], np.uint64)), want)


def test_input_is_left_alone_and_views_work() -> None:
    image = picture(64, 64)
    before = image.clone()
    flipped = corrupt(image.flip(1), "contrast", 4, 0)
    assert torch.equal(image, before)
    assert torch.equal(
        corrupt(image.movedim(-1, 0).contiguous().movedim(0, -1).flip(1), "contrast", 4, 0), flipped
    )


def test_empty_batch() -> None:
    assert corrupt(
        torch.empty(0, 32, 32, 3, dtype=torch.uint8),
        "fog" if "fog" in available_kinds() else "contrast",
        1,
        0,
    ).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"images_u8": torch.zeros(32, 32, 3)}, TypeError, "uint8"),
        ({"images_u8": np.zeros((32, 32, 3), np.uint8)}, TypeError, "from_numpy"),
        ({"images_u8": torch.zeros(3, 40, 40, dtype=torch.uint8)}, ValueError, "channels first"),
        ({"images_u8": torch.zeros(40, 40, dtype=torch.uint8)}, ValueError, r"\(H, W, 3\)"),
        ({"images_u8": torch.zeros(31, 40, 3, dtype=torch.uint8)}, ValueError, "32 x 32"),
        ({"severity": 0}, ValueError, "1..5"),
        ({"severity": 6}, ValueError, "1..5"),
        ({"severity": 2.0}, TypeError, "integer"),
        ({"severity": [1, 2]}, ValueError, "2 values for 1 images"),
        ({"kind": "gausian_noise"}, ValueError, "did you mean 'gaussian_noise'"),
        ({"kind": 20}, ValueError, "0..19"),
        ({"kind": True}, TypeError, "kind must be an integer"),
        ({"images_u8": torch.zeros(32, 32, 3, dtype=torch.uint8, device="meta")}, ValueError, "cpu and cuda"),
        ({"kind": torch.ones(1, dtype=torch.int64, device="meta")}, ValueError, "kind must be on the CPU"),
        (
            {"severity": torch.ones(1, dtype=torch.int64, device="meta")},
            ValueError,
            "severity must be on the CPU",
        ),
        ({"key": torch.ones(1, dtype=torch.int64, device="meta")}, ValueError, "key must be on the CPU"),
        ({"key": 0.5}, TypeError, "key must be an integer"),
        ({"kind": "identity", "severity": 9}, None, ""),
        ({"key": 2**64}, ValueError, "64 bits"),
        ({"flavour": "betghe"}, ValueError, "did you mean 'bethge'"),
        ({"constants": "tiny"}, ValueError, "tiny_imagenet"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    change: dict[str, object], error: type[Exception] | None, match: str
) -> None:
    arguments: dict[str, object] = {
        "images_u8": torch.zeros(32, 32, 3, dtype=torch.uint8),
        "kind": "gaussian_noise",
        "severity": 1,
        "key": 0,
    }
    arguments.update(change)
    if error is None:
        corrupt(**arguments)  # type: ignore[arg-type]
        return
    with pytest.raises(error, match=match):
        corrupt(**arguments)  # type: ignore[arg-type]


def test_fields_of_another_device_are_refused() -> None:
    image = torch.zeros(32, 32, 3, dtype=torch.uint8)
    fields = {"angle_deg": torch.zeros((), device="meta")}
    with pytest.raises(ValueError, match=r"'angle_deg' must be torch.float32 \(\) on cpu, got .* on meta"):
        apply(image, fields, "motion_blur", 1)


def test_core_refuses_what_the_front_would_not_pass() -> None:
    orders = np.zeros(1, core.IMAGE_DTYPE)
    orders["height"] = orders["width"] = 40
    with pytest.raises(ValueError, match="pointer is null"):
        core.run_cpu(orders, core.MODE_CORRUPT, 0, -1, 1)
    orders["kind"] = 77
    with pytest.raises(ValueError, match="kind 77 is unknown"):
        core.run_cpu(orders, core.MODE_CORRUPT, 0, -1, 1)
    orders["kind"], orders["severity"] = 1, 6
    with pytest.raises(ValueError, match="severity is 6"):
        core.run_cpu(orders, core.MODE_CORRUPT, 0, -1, 1)
    orders["severity"], orders["width"] = 5, 31
    with pytest.raises(ValueError, match="40 x 31"):
        core.run_cpu(orders, core.MODE_CORRUPT, 0, -1, 1)


OUT_OF_MEMORY = """
import resource, torch
from pipeline.corruptions import corrupt

torch.set_num_threads(2)
small = torch.zeros(32, 32, 3, dtype=torch.uint8)
want = corrupt(small, "elastic_transform", 1, 0)
images = torch.zeros(2, 3000, 3000, 3, dtype=torch.uint8)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
# Room for the result, not for 300 MB of scratch.
resource.setrlimit(resource.RLIMIT_AS, (used + images.numel() + 200_000_000, resource.RLIM_INFINITY))
try:
    corrupt(images, "elastic_transform", 1, 0)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(corrupt(small, "elastic_transform", 1, 0), want)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and address space limits")
def test_running_out_of_memory_is_an_error_not_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "ran out of memory for the scratch of 2 threads" in done.stdout


def test_other_threads_run_meanwhile() -> None:
    """The call holds no lock of Python's: this thread gets on in the middle of it."""
    images = picture(224, 224).expand(200, -1, -1, -1).contiguous()
    corrupt(images[:1], "zoom_blur", 1, 0)  # what only the first call does is Python's
    span_s: list[float] = []

    def work() -> None:
        span_s.append(time.perf_counter())
        corrupt(images, "zoom_blur", 1, 0)
        span_s.append(time.perf_counter())

    thread = threading.Thread(target=work)
    seen_s: list[float] = []
    thread.start()
    while thread.is_alive():
        seen_s.append(time.perf_counter())
        time.sleep(0.001)
    start, end = span_s
    quarter = (end - start) / 4
    assert any(start + quarter < t < end - quarter for t in seen_s)
