#!/bin/sh
# The cpu backend's C++ for arm64, whose vectors are NEON's, against the scalar rules: cross-compiled, and run by QEMU's
# emulation of a user program. Debian: g++-aarch64-linux-gnu, qemu-user.
set -eu
cd "$(dirname "$0")/../.."
CXX=${CXX:-aarch64-linux-gnu-g++}
QEMU=${QEMU:-qemu-aarch64}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

for source in tests/cpp/sanitize.cpp csrc/cpu/*.cpp; do
    case $source in */module.cpp) continue ;; esac # the binding; it needs Python
    "$CXX" -std=c++17 -O3 -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread \
        -c "$source" -o "$out/$(basename "$source").o"
done
"$CXX" -pthread -static "$out"/*.o -o "$out/run"
"$QEMU" "$out/run"
echo "as the scalar rules say"
