// What the cpu backend computes, each operation split into items and shared out over threads. fiun_fast/kernels/table.py
// describes the tables. Addresses and sizes are int64. Dtypes and sizes are checked in Python, not here.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "kernels.h"

namespace fiun {

// Instruction sets from the newest to the baseline: those compiled, and those among them that this CPU has.
std::vector<const Kernels*> compiled_kernels();
std::vector<const Kernels*> usable_kernels();

// What meets what.
struct Table {
    const int64_t* rows;  // [row_count, 5]: length, first source, K, first target, N
    int64_t row_count;
    const int64_t* sources;    // addresses of forget Fishers at the start of their row
    const int64_t* gradients;  // of the gradients beside them; null: unsigned
    const double* weights;     // one per source
    const int64_t* targets;    // [.., 3]: address of theta (0 where there is none), address of the original Fisher, node
    int fisher_kind;
};

struct Merging {
    int how;  // as in element.h
    double scale;
};

// What is done to the parameters of each node.
struct Limits {
    int theta_kind;
    const double* alpha;  // [nodes]; it and the next may be written to between runs
    const double* lam;    // [nodes]
    double exponent, cap;
};

// A dampening that is cut into work for `threads` threads once, and run as often as wanted; several threads may run it
// at the same time. What the structs point to has to outlive it.
class DampenLaunch {
  public:
    DampenLaunch(const Table& table, const Merging& merging, const Limits& limits, int threads);
    ~DampenLaunch();
    DampenLaunch(const DampenLaunch&) = delete;
    DampenLaunch& operator=(const DampenLaunch&) = delete;

    int threads() const { return threads_; }

    // counts [nodes, 3]: selected, zeroed, nonfinite are added to them. Without `write` they are all that is written.
    void run(const Kernels& kernels, int64_t* counts, bool write) const;

  private:
    struct Schedule;

    const Table table_;
    const Merging merging_;
    const Limits limits_;
    const int threads_;
    std::unique_ptr<const Schedule> schedule_;
};

// Large new memory comes page by page as it is first written, which takes longer than a merge. Asks for large pages.
void expect_writes(int64_t address, int64_t bytes);

void run_merge(const Kernels& kernels, int fisher_kind, const int64_t* sources, const double* weights, int64_t count,
               int merge, double scale, int64_t out, int64_t n, int threads);

// pairs [pair_count, 5]: address of a gradient, address of its accumulator, length, kinds of the two
void run_accumulate(const Kernels& kernels, const int64_t* pairs, int64_t pair_count, bool square, bool zero,
                    int threads);

// Adds the histograms of m / I over the table's rows to counts [nodes, histogram_bins]; bases [nodes]. `low` and
// `nearest` are those of ratio_bin in element.h. With gradients only elements count that their sign admits, for which the
// parameters are read, of kind `theta_kind`.
void run_histogram(const Kernels& kernels, const Table& table, const Merging& merging, int theta_kind,
                   const int64_t* bases, int low, bool nearest, int64_t* counts, int threads);

void run_outer_square(const Kernels& kernels, const OuterSquare& work, int threads);

// into [n] += sum of the squares of products [rows, n]
void run_add_squares(const Kernels& kernels, int fisher_kind, int64_t into, int64_t products, int64_t rows, int64_t n,
                     int threads);

}  // namespace fiun
