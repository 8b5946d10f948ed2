#!/bin/sh
# The CUDA kernels under compute-sanitizer on a GPU: the parity suite under memcheck and racecheck. $1 is the Python to
# run. Without torch's caching allocator every tensor is an allocation of its own, so that an access beyond its end is
# found; CUDA graphs need that allocator, which is why tests/kernels/test_gpu.py is not in here.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${1:-python}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer not found: it comes with the CUDA toolkit (package cuda-sanitizer-13-0)" >&2
    exit 1
}
"$PYTHON" -c 'import sys; from fiun_fast import kernels; sys.exit(kernels.load("cuda").why_not("cuda"))' || {
    echo "the cuda backend cannot run here" >&2
    exit 1
}
for tool in memcheck racecheck; do
    echo "compute-sanitizer --tool $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "$PYTHON" -m pytest tests/kernels/test_parity.py -q -x -k "cuda@cuda"
done
echo "clean"
