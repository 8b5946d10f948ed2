// Launches of the kernels. Nothing here allocates on the device or waits for it. Errors are std::runtime_error and name
// the call that failed. tables.h says what the arguments are.
#pragma once

#include <stdint.h>

#include <vector>

#include "tables.h"

namespace fiun {

using DampenKernel = void (*)(DampenArgs);
using HistogramKernel = void (*)(HistogramArgs);
using MergeKernel = void (*)(MergeArgs);
using AccumulateKernel = void (*)(AccumulateArgs);
using SquaresKernel = void (*)(SquaresArgs);

DampenKernel dampen_kernel_f32(int theta_kind, bool with_exponent);
DampenKernel dampen_kernel_f64(int theta_kind, bool with_exponent);
DampenKernel dampen_signed_kernel_f32(int theta_kind, bool with_exponent);  // with gradients
DampenKernel dampen_signed_kernel_f64(int theta_kind, bool with_exponent);
HistogramKernel histogram_kernel(int fisher_kind);
HistogramKernel histogram_signed_kernel(int theta_kind, int fisher_kind);
MergeKernel merge_kernel(int fisher_kind);
AccumulateKernel accumulate_kernel(int gradient_kind, int fisher_kind);
SquaresKernel squares_kernel(int fisher_kind);

int toolkit_version();            // that this was compiled with, as 13000 for CUDA 13.0
int driver_version();             // the newest CUDA that the driver knows; 0: no driver
std::vector<int> capabilities();  // of the GPUs, as 90 for 9.0

struct TileShape {
    int unit;  // elements that a lane loads at once: `start` and `length` of a vector tile are multiples of it
    int step;  // elements of each stream that a warp holds at once
};
TileShape tile_shape(int theta_kind, int fisher_kind);

// Warps of `dampen` that fit on the device at once. Loads the kernel, so that a launch may be captured in a graph.
int resident_warps(int device, int theta_kind, int fisher_kind, bool with_exponent, bool with_sign);

void run_dampen(int device, int theta_kind, int fisher_kind, const DampenArgs& args, int64_t stream);

// Warps of `histogram` that fit on the device at once.
int histogram_warps(int device, int theta_kind, int fisher_kind, bool with_sign);

// theta_kind: read where there are gradients
void run_histogram(int device, int theta_kind, int fisher_kind, const HistogramArgs& args, int64_t stream);

// sources [count], weights [count]: in host memory, as `pairs` below
void run_merge(int device, int fisher_kind, const int64_t* sources, const double* weights, int64_t count, int merge,
               double scale, int64_t out, int64_t n, int64_t stream);

// pairs [pair_count, 5]: address of a gradient, address of its accumulator, length, kinds of the two
void run_accumulate(int device, const int64_t* pairs, int64_t pair_count, bool square, bool zero, int64_t stream);

// into [n] += sum of the squares of products [rows, n]
void run_add_squares(int device, int fisher_kind, int64_t into, int64_t products, int64_t rows, int64_t n, int64_t stream);

}  // namespace fiun
