#include <algorithm>
#include <vector>

#include "pool.h"
#include "run.h"

namespace fiun {

// A work item is a strip of columns, or some rows of it where there are few strips; no other item writes there.
void run_outer_square(const Kernels& kernels, const OuterSquare& work, int threads) {
    const int64_t strips = (work.k + kernels.outer_columns - 1) / kernels.outer_columns;
    const int64_t tiles = (work.m + kernels.outer_rows - 1) / kernels.outer_rows;
    const int64_t wanted = std::min(tiles, std::max<int64_t>(1, (4 * threads + strips - 1) / strips));
    const int64_t rows = (tiles + wanted - 1) / wanted * kernels.outer_rows;
    const int64_t parts = (work.m + rows - 1) / rows, panel = work.positions * kernels.outer_columns;
    threads = int(std::min<int64_t>(threads, strips * parts));
    std::vector<float> panels(size_t(threads * panel));  // nothing is allocated on the threads, where nothing may throw
    auto do_part = [&](int64_t i, int thread) {
        const int64_t first = i % parts * rows;
        kernels.outer_square(work, i / parts * kernels.outer_columns, first, std::min(first + rows, work.m),
                             panels.data() + thread * panel);
    };
    share_out(strips * parts, threads, do_part);
}

void run_add_squares(const Kernels& kernels, int fisher_kind, int64_t into, int64_t products, int64_t rows, int64_t n,
                     int threads) {
    const int64_t bytes = kind_bytes[fisher_kind], step = std::max<int64_t>(4096, n / (4 * std::max(threads, 1)) + 1);
    auto do_part = [&](int64_t i, int) {
        const int64_t at = i * step;
        kernels.add_squares[fisher_kind](reinterpret_cast<void*>(into + at * bytes),
                                         reinterpret_cast<const void*>(products + at * bytes), rows, n,
                                         std::min(step, n - at));
    };
    share_out((n + step - 1) / step, threads, do_part);
}

}  // namespace fiun
