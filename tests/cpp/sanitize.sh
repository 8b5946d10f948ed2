#!/bin/sh
# Builds sanitize.cpp with the cpu backend's C++ and runs it under the sanitizers. CXX names the compiler (g++, clang++).
set -eu
cd "$(dirname "$0")/../.."
CXX=${CXX:-c++}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

for sanitizers in address,undefined thread; do
    echo "$CXX -fsanitize=$sanitizers"
    objects=
    for source in tests/cpp/sanitize.cpp csrc/cpu/*.cpp; do
        case $source in */module.cpp) continue ;; esac # the binding; it needs Python
        object=$out/$(basename "$source").o
        "$CXX" -std=c++17 -O2 -g1 -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread \
            "-fsanitize=$sanitizers" -fno-sanitize-recover=all -fno-omit-frame-pointer -c "$source" -o "$object"
        objects="$objects $object"
    done
    # shellcheck disable=SC2086
    "$CXX" -pthread "-fsanitize=$sanitizers" $objects -o "$out/run"
    "$out/run"
done
echo "clean"
