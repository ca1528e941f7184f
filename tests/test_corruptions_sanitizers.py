"""The core under AddressSanitizer and UndefinedBehaviorSanitizer: all kinds, odd sizes, all forms."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "pipeline" / "corruptions" / "csrc"

MAIN = r"""
#include <cstdio>
#include <vector>
#include "core.h"

int main() {
  std::vector<std::vector<uint8_t>> textures;
  std::vector<const uint8_t*> pointers;
  std::vector<int32_t> heights, widths;
  for (int i = 0; i < 16; ++i) {
    heights.push_back(70 + i);
    widths.push_back(60 + i);
    textures.emplace_back(3 * heights[i] * widths[i], uint8_t(9 * i));
  }
  for (auto& t : textures) pointers.push_back(t.data());
  if (vqsa_set_frost_textures(pointers.data(), heights.data(), widths.data())) return 2;
  const int sizes[][2] = {{32, 32}, {33, 47}, {64, 64}, {1000, 37}, {35, 300}};
  uint32_t state = 1;
  for (auto& size : sizes) {
    const int h = size[0], w = size[1];
    const bool large = h * w > 10000;
    for (int kind = 0; kind < 20; ++kind) {
      for (int severity = 1; severity <= 5; severity += large ? 4 : 1) {
        for (int flavour = 0; flavour < 2; ++flavour) {
          for (int impl = 0; impl < 2; ++impl) {
            // Exact heap blocks: one byte too far is seen.
            std::vector<uint8_t> in(3 * h * w), out(3 * h * w);
            for (auto& v : in) v = uint8_t((state = state * 1664525u + 1013904223u) >> 24);
            VqsaImage image = {};
            image.in = in.data();
            image.out = out.data();
            image.height = h;
            image.width = w;
            image.kind = kind;
            image.severity = severity;
            image.key = 0x8000000000000000ull + kind;
            if (vqsa_run_cpu(&image, 1, VQSA_CORRUPT, flavour, -1, 1, impl, "generic")) {
              std::printf("%s\n", vqsa_last_error());
              return 1;
            }
            if (impl == 1 || large) continue;
            std::vector<uint32_t> fields(vqsa_field_words(kind, severity, flavour, -1, h, w));
            std::vector<uint32_t> noise(vqsa_noise_words(kind, severity, flavour, -1, h, w), 0x3F000000u);
            image.fields = fields.data();
            image.noise = noise.empty() ? nullptr : noise.data();
            if (vqsa_run_cpu(&image, 1, VQSA_DRAW, flavour, -1, 1, impl, "generic")) return 1;
            if (vqsa_run_cpu(&image, 1, VQSA_APPLY, flavour, -1, 1, impl, "generic")) return 1;
          }
        }
      }
    }
  }
  if (vqsa_run_cpu(nullptr, 0, VQSA_CORRUPT, 0, -1, 4, 0, nullptr)) return 3;
  std::puts("clean");
}
"""


@pytest.mark.slow
def test_core_is_clean_under_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    main = tmp_path / "main.cpp"
    main.write_text(MAIN)
    sources = ["core.cpp", "cpu_select.cpp", "cpu_stages.cpp", "plan.cpp", "tables.cpp", "cuda_absent.cpp"]
    flags = [
        "-std=c++17",
        "-O1",
        "-g0",
        "-ffp-contract=off",
        "-fsanitize=address,undefined",
        "-static-libasan",
    ]
    build = subprocess.run(
        [compiler, *flags, "-fno-sanitize-recover=all", f"-I{CSRC}", str(main)]
        + [str(CSRC / source) for source in sources]
        + ["-o", str(tmp_path / "main"), "-pthread"],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr[-3000:]
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.strip() == "clean"
