"""The codebook kernels on the host shim under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer.

ThreadSanitizer sees each CUDA thread as a thread and learns of order only from barriers: a barrier too few is a
race. AddressSanitizer knows the exact size of shared memory and of every buffer.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.codebook_shim import CSRC, FLAGS, compiler

MAIN = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "codebook.h"

namespace {

double uniform() {
  static uint64_t state = 1;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (state >> 11) * 0x1p-53 - 0.5;
}

int check(int n, int k, int d, bool cosine, int tile, bool equal) {
  std::vector<float> z(n * d), codes(k * d);
  for (auto& v : z) v = float(uniform());
  for (auto& v : codes) v = equal ? 0.25f : float(uniform());
  if (equal) codes[0] = 100.0f;  // of itself the codebook's mean would take the others apart
  const int64_t work = vqsa_codebook_workspace_bytes(n, k, d, cosine, tile);
  std::vector<double> prepared(vqsa_codebook_prepared_bytes(k, d, cosine) / 8), workspace(work / 8), error(n);
  std::vector<int64_t> index(n), usage(k), effort(2);
  std::vector<float> sqdist(n), quantised(n * d);
  const int64_t changed[] = {1, k - 1};
  int32_t alarm = 0;
  void* p = prepared.data();
  void* w = workspace.data();
  if (vqsa_codebook_prepare(codes.data(), 0, k, d, cosine, p, w, nullptr, 0, nullptr)) return 2;
  if (vqsa_codebook_prepare(codes.data(), 0, k, d, cosine, p, w, changed, 2, nullptr)) return 2;
  if (vqsa_codebook_search(z.data(), 0, n, codes.data(), 0, k, d, cosine, tile, p, w, index.data(), sqdist.data(),
                           quantised.data(), error.data(), usage.data(), effort.data(), &alarm, nullptr))
    return 2;
  for (int r = 0; r < n; ++r) {
    double least = 1e300, chosen = 0;
    for (int i = 0; i < k; ++i) {
      double zz = 0, ee = 0, ze = 0, sum = 0;
      for (int j = 0; j < d; ++j) {
        const double a = z[r * d + j], b = codes[i * d + j];
        zz += a * a, ee += b * b, ze += a * b, sum += (a - b) * (a - b);
      }
      const double distance = cosine ? 2 - 2 * ze / std::sqrt(zz * ee) : sum;
      if (i == index[r]) chosen = distance;
      least = std::fmin(least, distance);
    }
    if (!(chosen <= least * (1 + 1e-12) + 1e-15)) {
      std::printf("row %d: %g instead of %g\n", r, chosen, least);
      return 1;
    }
  }
  if (alarm != (std::getenv("VQSA_SHIM_FAULT")[0] != 0 && tile == 3)) return 4;
  if ((equal || alarm) && effort[1] != n) return 3;
  return 0;
}

/// Segments that end in a run of features, fill it and go on through several.
int check_sums() {
  const int n = 300, d = 200, k = 40;
  std::vector<float> z(n * d), code(n * d), out(k * d, NAN);
  for (auto& v : z) v = float(uniform());
  for (auto& v : code) v = float(uniform());
  std::vector<int64_t> order(n);
  std::vector<int32_t> slot(n);
  std::vector<double> workspace(vqsa_codebook_segment_sum_bytes(n, d) / 8);
  for (int i = 0; i < n; ++i) order[i] = n - 1 - i, slot[i] = i < 3 ? -1 : i < 60 ? i / 8 : i < 200 ? 9 : 10 + i / 16;
  const double scale = 0.5;
  if (vqsa_codebook_segment_sum(z.data(), 0, n, d, order.data(), slot.data(), code.data(), &scale, out.data(), k,
                                workspace.data(), nullptr))
    return 2;
  for (int s = 0; s < k; ++s)
    for (int j = 0; j < d; ++j) {
      double sum = 0;
      for (int i = 0; i < n; ++i)
        if (slot[i] == s) sum += scale * (double(code[order[i] * d + j]) - z[order[i] * d + j]);
      if (!(std::fabs(out[s * d + j] - sum) <= 1e-6)) return 5;
    }
  return 0;
}

}  // namespace

int main() {
  if (int code = check_sums()) return code;
  for (int tile = 1; tile <= 3; ++tile) {
    if (int code = check(40, 150, 70, tile == 1, tile, false)) return code;
    // As many blocks side by side as features.
    if (int code = check(6, 600, 72, tile == 1, tile, false)) return code;
    if (int code = check(3, 70, 65, false, tile, true)) return code;
  }
  if (vqsa_codebook_together() != 4) return 6;
  std::puts("clean");
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_kernels_are_clean_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    main = tmp_path / "main.cpp"
    main.write_text(MAIN)
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O1", "-g1", f"-I{CSRC}", "-w"]
    sources = [str(main), str(CSRC / "codebook.cu")]
    built = subprocess.run(
        [compiler(), *FLAGS, *flags, "-x", "c++", *sources, "-o", str(tmp_path / "main")],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    # Blocks that give up waiting multiply what they find, unordered, and drop the result: no matter for TSan.
    faults = ["", "lost"] if sanitizer == "address,undefined" else [""]
    for fault in faults:
        done = subprocess.run(
            [str(tmp_path / "main")],
            capture_output=True,
            text=True,
            env={**os.environ, "VQSA_SHIM_FAULT": fault, "VQSA_SHIM_MULTIPROCESSORS": "6"},
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        assert done.stdout.strip() == "clean"
