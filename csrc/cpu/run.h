// The three operations over work tables: split into items, shared out over threads. fiun_fast/kernels/table.py describes
// the tables. All addresses and sizes are int64; nothing is checked here, Python has done so.
#pragma once

#include <stdint.h>

#include <vector>

#include "kernels.h"

namespace fiun {

// Instruction sets from the newest to the baseline: those compiled, and those among them that this CPU has.
std::vector<const Kernels*> compiled_kernels();
std::vector<const Kernels*> usable_kernels();

struct DampenTable {
    const int64_t* rows;  // [row_count, 5]: length, first source, K, first target, N
    int64_t row_count;
    const int64_t* sources;  // addresses of forget Fishers at the start of their row
    const double* weights;   // one a source
    const int64_t* targets;  // [.., 3]: address of theta, address of the original Fisher, slot
    const double* alpha;     // [slots]
    const double* lam;       // [slots]
    int64_t* counts;         // [slots, 3]: selected, zeroed, nonfinite
    int64_t slots;
    int theta_kind, fisher_kind, merge;
    double scale, exponent, cap;
};

void run_dampen(const Kernels& kernels, const DampenTable& table, bool write, int threads);

void run_merge(const Kernels& kernels, int fisher_kind, const int64_t* sources, const double* weights, int64_t count,
               int merge, double scale, int64_t out, int64_t n, int threads);

// pairs [pair_count, 5]: address of a gradient, address of its accumulator, length, kind of either
void run_accumulate(const Kernels& kernels, const int64_t* pairs, int64_t pair_count, bool square, bool zero,
                    int threads);

// counts [slots, histogram_bins] of m / I over the table's rows; bases [slots]. `low`, `nearest`: element.h, ratio_bin
void run_histogram(const Kernels& kernels, const DampenTable& table, const int64_t* bases, int low, bool nearest,
                   int64_t* counts, int threads);

void run_outer_square(const Kernels& kernels, const OuterSquare& work, int threads);

// into [n] += sum of the squares of products [rows, n]
void run_add_squares(const Kernels& kernels, int fisher_kind, int64_t into, int64_t products, int64_t rows, int64_t n,
                     int threads);

}  // namespace fiun
