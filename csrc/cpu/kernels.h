// What one instruction set offers: the innermost loops over contiguous memory, one function per combination of dtypes.
#pragma once

#include <stdint.h>

#include "../kinds.h"

namespace fiun {

struct Counts {
    int64_t selected = 0, zeroed = 0, nonfinite = 0;
};

struct Dampening {
    double exponent, cap;
    bool write;  // false: only count
};

// One of the nodes that a merged Fisher is applied to.
struct Node {
    void* theta;           // [n]
    const void* original;  // [n]
    double alpha, lam;
    Counts counts{};  // added to
};
constexpr int nodes_at_once = 4;

// Forget Fishers, and how they are merged.
struct Sources {
    const int64_t* addresses;
    const double* weights;
    int64_t count;
    int how;  // 0 max, 1 mean, 2 sum
    double scale;
};
constexpr int sources_in_registers = 4;

// merged [n]; gradient [n], or null: unsigned; `count` nodes, up to nodes_at_once
using DampenLoop = void (*)(Node* nodes, int count, const void* merged, const void* gradient, int64_t n,
                            const Dampening& how);
// the same, unsigned, of sources that are merged as they are read, from `offset` elements on; false, and nothing done, where more
// than sources_in_registers or where it would not be faster
using DampenMergingLoop = bool (*)(Node* nodes, int count, const Sources& sources, int64_t offset, int64_t n,
                                   const Dampening& how);
// out [n] = scale * reduce over k of weights[k] * (sources[k] + offset elements) [n]; how: 0 max, 1 mean, 2 sum
using MergeLoop = void (*)(void* out, const int64_t* sources, const double* weights, int64_t count, int64_t offset,
                           int64_t n, int how, double scale);
// into [n] += gradient^2, or |gradient|; with zero, gradient = 0
using AccumulateLoop = void (*)(void* into, void* gradient, int64_t n, bool square, bool zero);
// bins [n]: of merged [n] / original [n], element.h has the rule
using HistogramLoop = void (*)(const void* original, const void* merged, int64_t n, int low, int64_t base, bool nearest,
                               int32_t* bins);
// bins [n]: histogram_bins where theta [n] and gradient [n] do not have opposite signs
using AdmitLoop = void (*)(const void* theta, const void* gradient, int64_t n, int32_t* bins);

// into [n] += sum of squares of `rows` rows [n] of products, `stride` elements apart
using AddSquaresLoop = void (*)(void* into, const void* products, int64_t rows, int64_t stride, int64_t n);

// into [m, k] += sum over samples of (left^T right)^2; left [samples, positions, m] and right [samples, positions, k] with
// given distances between samples and between positions, in elements; m and k are contiguous.
struct OuterSquare {
    const float *left, *right;
    float* into;
    int64_t samples, positions, m, k;
    int64_t left_sample, left_step, right_sample, right_step;
};
// columns [from, from + outer_columns) and rows [first, last) of into; panel: scratch [positions * outer_columns]
using OuterSquareLoop = void (*)(const OuterSquare& o, int64_t from, int64_t first, int64_t last, float* panel);

struct Kernels {
    const char* isa;
    DampenLoop dampen[theta_kinds][fisher_kinds];
    DampenMergingLoop dampen_merging[theta_kinds][fisher_kinds];
    MergeLoop merge[fisher_kinds];
    AccumulateLoop accumulate[theta_kinds][fisher_kinds];
    HistogramLoop histogram[fisher_kinds];
    AdmitLoop admit[theta_kinds][fisher_kinds];
    AddSquaresLoop add_squares[fisher_kinds];
    OuterSquareLoop outer_square;
    int outer_rows, outer_columns;  // of a tile that fits into registers
};

// Run-time choice is for x86-64; elsewhere the baseline is all there is.
#if defined(__x86_64__) && defined(__GNUC__)
#define FIUN_X86 1
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

}  // namespace fiun
