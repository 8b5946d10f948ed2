#include <algorithm>
#include <atomic>
#include <vector>

#include "pool.h"
#include "run.h"

namespace fiun {

// A work item is a strip of columns, or some rows of it where there are few strips; no other item writes there.
void run_outer_square(const Kernels& kernels, const OuterSquare& work, int threads) {
    struct Job {
        const Kernels& kernels;
        const OuterSquare& work;
        int64_t strips, parts, rows;  // each strip is cut into parts of `rows` rows
        int64_t panel;                // floats of scratch that a thread needs
        std::vector<float> panels{};  // [threads, panel]; nothing is allocated on the threads, where nothing may throw
        std::atomic<int64_t> next{0};
    };
    const int64_t strips = (work.k + kernels.outer_columns - 1) / kernels.outer_columns;
    const int64_t tiles = (work.m + kernels.outer_rows - 1) / kernels.outer_rows;
    const int64_t wanted = std::min(tiles, std::max<int64_t>(1, (4 * threads + strips - 1) / strips));
    const int64_t rows = (tiles + wanted - 1) / wanted * kernels.outer_rows;
    Job job{kernels, work, strips, (work.m + rows - 1) / rows, rows, work.positions * kernels.outer_columns};
    threads = int(std::min<int64_t>(threads, job.strips * job.parts));
    job.panels.resize(size_t(threads * job.panel));
    const auto body = [](void* context, int thread) {
        Job& j = *static_cast<Job*>(context);
        float* const panel = j.panels.data() + thread * j.panel;
        for (int64_t i; (i = j.next.fetch_add(1, std::memory_order_relaxed)) < j.strips * j.parts;) {
            const int64_t first = i % j.parts * j.rows;
            j.kernels.outer_square(j.work, i / j.parts * j.kernels.outer_columns, first,
                                   std::min(first + j.rows, j.work.m), panel);
        }
    };
    on_threads(threads, body, &job);
}

void run_add_squares(const Kernels& kernels, int fisher_kind, int64_t into, int64_t products, int64_t rows, int64_t n,
                     int threads) {
    struct Job {
        const Kernels& kernels;
        int kind;
        int64_t into, products, rows, n, step;
        std::atomic<int64_t> next{0};
    } job{kernels, fisher_kind, into, products, rows, n, std::max<int64_t>(4096, n / (4 * std::max(threads, 1)) + 1)};
    const auto work = [](void* context, int) {
        Job& j = *static_cast<Job*>(context);
        const int64_t bytes = kind_bytes[j.kind];
        for (int64_t at; (at = j.next.fetch_add(j.step, std::memory_order_relaxed)) < j.n;) {
            j.kernels.add_squares[j.kind](reinterpret_cast<void*>(j.into + at * bytes),
                                          reinterpret_cast<const void*>(j.products + at * bytes), j.rows, j.n,
                                          std::min(j.step, j.n - at));
        }
    };
    on_threads(int(std::min<int64_t>(threads, (n + job.step - 1) / job.step)), work, &job);
}

}  // namespace fiun
