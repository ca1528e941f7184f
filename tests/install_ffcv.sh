#!/usr/bin/env bash
# Installs ffcv 1.0.2 into an environment of its own, .venv-ffcv, for the interop tests and the benchmark.
#
#   tests/install_ffcv.sh [PYTHON]      PYTHON: an environment with torch, which is borrowed; .venv's by default
#
# ffcv is built against OpenCV's and libjpeg-turbo's headers; of OpenCV it needs two parts, so its full
# development package (200 Debian packages) is not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-.venv/bin/python}"
out="$PWD/.venv-ffcv"
if [ -x "$out/bin/python" ] && "$out/bin/python" -c 'import ffcv' 2>/dev/null; then
  echo "ffcv is there: $out"
  exit 0
fi
packages=(libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev pkg-config g++)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
  apt-get update -q && apt-get install -y -q --no-install-recommends "${packages[@]}"
fi
rm -rf "$out"
"$python" -m venv "$out"
site="$("$out/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
"$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$site/borrowed.pth"
mkdir -p "$out/shim/opencv2"
printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' > "$out/shim/opencv2/opencv.hpp"
cat > "$out/shim/opencv4.pc" <<PC
Name: opencv4
Description: the two parts of OpenCV that ffcv uses
Version: 4
Libs: -lopencv_imgproc -lopencv_core
Cflags: -I$out/shim -I/usr/include/opencv4
PC
"$out/bin/python" -m pip install -q -c constraints.txt numba setuptools wheel
# ffcv's own list of requirements names packages it does not use, and another OpenCV.
PKG_CONFIG_PATH="$out/shim" "$out/bin/python" -m pip install -q --no-deps --no-build-isolation ffcv==1.0.2
"$out/bin/python" -c 'import ffcv; from importlib.metadata import version; print("ffcv", version("ffcv"))'
