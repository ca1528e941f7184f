"""Bytes that each corruption has to move through a GPU's memory, and the time that takes at least.

    python benchmarks/traffic.py

Counted per image, stage by stage: every byte of the image, the fields and the planes in between once for each
stage that reads or writes it, as if caches kept a stage's own repeats and nothing from one stage to the next.
"Least" is what any implementation moves: the image in and out (frost: its texture too). Small tables are left
out. benchmarks/corruptions.py sets its measured CUDA times against these.

Shapes: P = height x width.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from pipeline.corruptions import HELD_OUT_KINDS, TRAINING_KINDS

H200_BYTES_PER_S = 4.3e12
"""Device memory rate that copies reach on an H200 (4.8 TB/s on paper)."""

GLASS_ITERATIONS = (2, 1, 3, 2, 2)
SNOW_ZOOM = (3, 2, 4, 4.5, 2.5)
PIXELATE_SHARE = (0.6, 0.5, 0.4, 0.3, 0.25)
FOG_COARSE_SIDE = 32


class StageBytes(NamedTuple):
    stage: str
    read: int
    written: int


def stages(kind: str, severity: int, height: int = 224, width: int = 224) -> list[StageBytes]:
    """Return what each stage of a kind reads and writes per image, hendrycks flavour, ImageNet's constants."""
    pixels = height * width
    image = 3 * pixels
    normals = StageBytes("SnowNormals", 0, 4 * pixels)
    match kind:
        case "gaussian_noise" | "shot_noise" | "impulse_noise" | "speckle_noise":
            return [StageBytes("NoiseFused", image, image)]
        case "defocus_blur":
            return [StageBytes("Defocus", image, image)]
        case "gaussian_blur":
            return [StageBytes("GaussianBlur", image, image)]
        case "zoom_blur":
            return [StageBytes("ZoomBlur", image, image)]
        case "brightness":
            return [StageBytes("Brightness", image, image)]
        case "saturate":
            return [StageBytes("Saturate", image, image)]
        case "contrast":
            return [StageBytes("ContrastSum", image, 0), StageBytes("ContrastApply", image, image)]
        case "glass_blur":
            turns = GLASS_ITERATIONS[severity - 1]
            offsets = 4 * pixels
            return [
                *[StageBytes("GlassDraw", 0, offsets)] * turns,
                StageBytes("GlassBlurIn", image, image),
                *[StageBytes("GlassShuffle", offsets + image, image)] * turns,
                StageBytes("GlassBlurOut", image, image),
            ]
        case "motion_blur":
            return [StageBytes("MotionDraw", 0, 4), StageBytes("MotionApply", image + 4, image)]
        case "snow":
            cropped = round(pixels / SNOW_ZOOM[severity - 1] ** 2)
            return [
                normals,
                StageBytes("SnowZoom", 4 * cropped, 4 * pixels),
                StageBytes("SnowLayer", 4 * pixels, pixels),
                StageBytes("SnowApply", image + pixels, image),
            ]
        case "frost":
            return [StageBytes("FrostDraw", 0, 12), StageBytes("FrostApply", 2 * image + 12, image)]
        case "fog":
            side = FOG_COARSE_SIDE
            out = [StageBytes("FogCoarse", 0, 4 * side**2)]
            while side < max(height, width):
                out.append(StageBytes("FogRefine", 4 * side**2, 16 * side**2))
                side *= 2
            return [
                *out,
                StageBytes("FogRange", 4 * side**2, 0),
                StageBytes("FogField", 4 * pixels, 4 * pixels),
                StageBytes("FogBrightest", image, 0),
                StageBytes("FogApply", image + 4 * pixels, image),
            ]
        case "elastic_transform":
            planes, warped = 2 * 4 * pixels, 4 * image
            return [
                StageBytes("ElasticNoise", 0, planes),
                StageBytes("ElasticDown", planes, planes),
                StageBytes("ElasticAcross", planes, planes),
                StageBytes("ElasticPoints", 0, 24),
                StageBytes("ElasticWarp", image, warped),
                StageBytes("ElasticSample", planes + warped, image),
            ]
        case "pixelate":
            share = PIXELATE_SHARE[severity - 1]
            rows = 3 * height * int(width * share)
            small = 3 * int(height * share) * int(width * share)
            return [
                StageBytes("PixelateAcross", image, rows),
                StageBytes("PixelateDown", rows, small),
                StageBytes("PixelateUp", small, image),
            ]
        case "jpeg_compression":
            planes = -(-height // 16) * -(-width // 16) * 16 * 16 * 3 // 2
            return [StageBytes("JpegBlocks", image, planes), StageBytes("JpegColours", planes, image)]
        case "spatter":
            apply = StageBytes("SpatterApply", image + 4 * pixels, image)
            layer = StageBytes("SpatterLayer", 4 * pixels, pixels)
            if severity >= 4:  # mud
                return [normals, layer, StageBytes("SpatterMud", pixels, 4 * pixels), apply]
            return [
                normals,
                layer,
                StageBytes("SpatterSobel", pixels, 4 * pixels),
                StageBytes("SpatterThin", 4 * pixels, pixels),
                StageBytes("SpatterLink", pixels, 0),
                StageBytes("SpatterAcross", pixels, pixels),
                StageBytes("SpatterDistance", pixels, 4 * pixels),
                StageBytes("SpatterSmooth", 4 * pixels, pixels),
                StageBytes("SpatterRelief", pixels, pixels),
                StageBytes("SpatterWater", 2 * pixels, 4 * pixels),
                StageBytes("SpatterScale", 4 * pixels, 4 * pixels),
                apply,
            ]
        case _:
            raise ValueError(f"no bytes are counted for {kind!r}")


def stage_bytes(kind: str, severity: int) -> int:
    """Return the bytes that all stages of a kind move per image at 224 px."""
    return sum(one.read + one.written for one in stages(kind, severity))


def least_bytes(kind: str) -> int:
    """Return the bytes that any implementation moves per image at 224 px."""
    return (9 if kind == "frost" else 6) * 224 * 224


def mix_bytes() -> float:
    """Return the mean of stage_bytes over the uniform mix: identity and 15 kinds, five severities."""
    copied = 5 * 6 * 224 * 224
    return (copied + sum(stage_bytes(k, s) for k in TRAINING_KINDS for s in range(1, 6))) / 80


def table() -> str:
    """Return the floors as Markdown: time per image of the least bytes and of the stages' bytes."""
    lines = [
        "| kind | least kB | stages kB | least ns | stages ns | measured / stages |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*TRAINING_KINDS, *HELD_OUT_KINDS):
        least = least_bytes(kind)
        moved = sorted({stage_bytes(kind, s) for s in range(1, 6)})
        ends = [moved[0]] if len(moved) == 1 else [moved[0], moved[-1]]
        kilobytes = "–".join(f"{b / 1e3:.0f}" for b in ends)
        times = "–".join(f"{b / H200_BYTES_PER_S * 1e9:.0f}" for b in ends)
        first = f"{least / 1e3:.0f} | {kilobytes} | {least / H200_BYTES_PER_S * 1e9:.0f}"
        lines.append(f"| {kind} | {first} | {times} | not measured |")
    mix = mix_bytes()
    lines.append(
        f"| uniform mix | {6 * 224 * 224 / 1e3:.0f} | {mix / 1e3:.0f} | "
        f"{6 * 224 * 224 / H200_BYTES_PER_S * 1e9:.0f} | {mix / H200_BYTES_PER_S * 1e9:.0f} | not measured |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(table())
