// Histograms of m / I for every node of a work table, in one pass. The bins of a block are computed by the loops of the
// instruction set, without branches; adding up is scalar, into the thread's own counts.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../element.h"
#include "pool.h"
#include "run.h"

namespace fiun {
namespace {

constexpr int64_t bins = common::histogram_bins;
constexpr int64_t block = 512;    // bins computed before they are counted
constexpr int64_t tile = 16384;   // elements of a merged Fisher that are applied to all nodes before the next are merged
constexpr int64_t unit_least = int64_t(1) << 15, unit_most = int64_t(1) << 20;  // elements worth handing to a thread at once

struct Item {  // elements [from, to) of a row, for targets [first, last) of the row
    int64_t row, from, to, first, last;
};

std::vector<Item> cut(const Table& table, int threads) {
    int64_t total = 0;
    for (int64_t r = 0; r < table.row_count; ++r) total += table.rows[5 * r] * table.rows[5 * r + 4];
    const int64_t unit = std::clamp(total / (int64_t(threads) * 8), unit_least, unit_most) / tile * tile;
    std::vector<Item> items;
    for (int64_t r = 0; r < table.row_count; ++r) {
        const int64_t length = table.rows[5 * r], nodes = table.rows[5 * r + 4];
        for (int64_t from = 0; from < length; from += unit) {
            const int64_t to = std::min(from + unit, length), share = std::clamp<int64_t>(unit / (to - from), 1, nodes);
            for (int64_t first = 0; first < nodes; first += share) {
                items.push_back({r, from, to, first, std::min(first + share, nodes)});
            }
        }
    }
    return items;
}

// The counts of one node; passed on when another node's turn comes. Two sets, and neighbours go to different ones: many
// elements in a row may have the same bin (0 above all), and each addition would wait for the one before.
class Bins {
  public:
    static constexpr int64_t own_size = 2 * (bins + 1);

    Bins(int64_t* counts, uint32_t* own) : counts_(counts), own_(own) {}  // own [2, bins + 1]: zeros before and after
    ~Bins() { flush(); }
    Bins(const Bins&) = delete;
    Bins& operator=(const Bins&) = delete;

    void add(int64_t node, const int32_t* where, int64_t n) {  // what has no bin is counted too, as `bins`, and dropped
        if (node != node_ || room_ < n) flush();
        node_ = node;
        room_ -= n;
        uint32_t* const even = own_;
        uint32_t* const odd = even + bins + 1;
        int64_t j = 0;
        for (; j + 1 < n; j += 2) {
            ++even[where[j]];
            ++odd[where[j + 1]];
        }
        if (j < n) ++even[where[j]];
    }

  private:
    void flush() {
        for (int64_t b = 0; b < bins; ++b) {
            const int64_t sum = int64_t(own_[b]) + own_[b + bins + 1];
            static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t), "counts are shared as plain integers");
            auto& count = reinterpret_cast<std::atomic<int64_t>*>(counts_)[node_ * bins + b];
            if (sum != 0) count.fetch_add(sum, std::memory_order_relaxed);
        }
        std::fill(own_, own_ + own_size, 0u);
        room_ = int64_t(1) << 31;
    }

    int64_t* counts_;
    int64_t node_ = 0, room_ = int64_t(1) << 31;  // elements until a count may overflow
    uint32_t* own_;
};

struct Work {
    const Kernels& kernels;
    const Table& table;
    const Merging& merging;
    int theta_kind;
    const int64_t* bases;
    int low;
    bool nearest;
    int64_t* counts;
    std::vector<Item> items;
    std::vector<double> scratch;  // [threads, 2, tile]; nothing is allocated on the threads, where nothing may throw
    std::vector<uint32_t> own;    // [threads, Bins::own_size]

    void operator()(int64_t number, int thread) {
        const int64_t bytes = kind_bytes[table.fisher_kind];
        const MergeLoop merge = kernels.merge[table.fisher_kind];
        const HistogramLoop find = kernels.histogram[table.fisher_kind];
        const AdmitLoop admit = kernels.admit[theta_kind][table.fisher_kind];
        char* const merged_here = reinterpret_cast<char*>(scratch.data() + thread * 2 * tile);
        char* const gradient_here = merged_here + tile * bytes;
        int32_t where[block];
        Bins mine(counts, own.data() + thread * Bins::own_size);
        const Item& item = items[size_t(number)];
        const int64_t* row = table.rows + 5 * item.row;
        const int64_t* sources = table.sources + row[1];
        const double* weights = table.weights + row[1];
        const int64_t* gradients = table.gradients == nullptr ? nullptr : table.gradients + row[1];
        const bool adds = row[2] > 1 || weights[0] != 1, merges = adds || merging.scale != 1;
        for (int64_t at = item.from; at < item.to;) {
            const int64_t n = merges ? std::min(tile, item.to - at) : item.to - at;
            const char* merged = reinterpret_cast<const char*>(sources[0]) + at * bytes;
            if (merges) {
                merge(merged_here, sources, weights, row[2], at, n, merging.how, merging.scale);
                merged = merged_here;
            }
            const char* gradient = nullptr;
            if (gradients != nullptr) {
                gradient = reinterpret_cast<const char*>(gradients[0]) + at * bytes;
                if (adds) {
                    merge(gradient_here, gradients, weights, row[2], at, n, int(common::Merge::sum), 1);
                    gradient = gradient_here;
                }
            }
            for (int64_t t = item.first; t < item.last; ++t) {
                const int64_t* target = table.targets + 3 * (row[3] + t);
                const char* theta = reinterpret_cast<const char*>(target[0]) + at * kind_bytes[theta_kind];
                const char* original = reinterpret_cast<const char*>(target[1]) + at * bytes;
                for (int64_t b = 0; b < n; b += block) {
                    const int64_t m = std::min(block, n - b);
                    find(original + b * bytes, merged + b * bytes, m, low, bases[target[2]], nearest, where);
                    if (gradient != nullptr) {
                        admit(theta + b * kind_bytes[theta_kind], gradient + b * bytes, m, where);
                    }
                    mine.add(target[2], where, m);
                }
            }
            at += n;
        }
    }
};

}  // namespace

void run_histogram(const Kernels& kernels, const Table& table, const Merging& merging, int theta_kind,
                   const int64_t* bases, int low, bool nearest, int64_t* counts, int threads) {
    Work work{kernels, table, merging, theta_kind, bases, low, nearest, counts, cut(table, threads), {}, {}};
    threads = int(std::min<int64_t>(threads, int64_t(work.items.size())));
    work.scratch.resize(size_t(threads * 2 * tile));
    work.own.resize(size_t(threads * Bins::own_size));
    share_out(int64_t(work.items.size()), threads, work);
}

}  // namespace fiun
