#include "run.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../element.h"
#include "pool.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fiun {
namespace {

// Elements of a merged Fisher that are applied to all nodes before the next ones are merged. Long enough for the
// hardware to follow each stream, short enough to stay in the second-level cache.
constexpr int64_t tile = 32768;

// Nodes for which sources are merged as they are read, each time anew. For more of them once, into a tile.
constexpr int64_t merges_again = 2;

// Bytes of memory traffic to hand to a thread at once: at most, and at least (waking another for less costs more).
constexpr int64_t unit_most = int64_t(16) << 20, unit_least = int64_t(128) << 10;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Small enough that every thread gets many, so that none waits long at the end.
int64_t unit_bytes(int64_t total, int threads) {
    return std::clamp(total / (int64_t(threads) * 16), unit_least, unit_most);
}

struct Item {  // elements [from, to) of a row, for targets [first, last) of the row
    int64_t row, from, to, first, last;
};

// Whether the sources of a row are more than one, or weighted: then their gradients have to be added up.
bool adds(const Table& table, const int64_t* row) { return row[2] > 1 || table.weights[row[1]] != 1; }

bool needs_merge(const Table& table, const Merging& merging, const int64_t* row) {
    return adds(table, row) || merging.scale != 1;
}

// Adds up the counts of one node and passes them on when another node's turn comes.
class Tally {
  public:
    explicit Tally(int64_t* counts) : counts_(counts) {}
    ~Tally() { flush(); }
    Tally(const Tally&) = delete;
    Tally& operator=(const Tally&) = delete;

    void add(int64_t node, const Counts& counts) {
        if (node != node_) {
            flush();
            node_ = node;
        }
        sum_.selected += counts.selected;
        sum_.zeroed += counts.zeroed;
        sum_.nonfinite += counts.nonfinite;
    }

  private:
    void flush() {
        const int64_t sums[3] = {sum_.selected, sum_.zeroed, sum_.nonfinite};
        for (int i = 0; i < 3; ++i) {
            static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t), "counts are shared as plain integers");
            auto& count = reinterpret_cast<std::atomic<int64_t>*>(counts_)[3 * node_ + i];
            if (sums[i] != 0) count.fetch_add(sums[i], std::memory_order_relaxed);
        }
        sum_ = Counts();
    }

    int64_t* counts_;
    int64_t node_ = 0;
    Counts sum_;
};

}  // namespace

void expect_writes(int64_t address, int64_t bytes) {
#ifdef __linux__
    constexpr int64_t page = int64_t(2) << 20;
    const int64_t from = divide_up(address, page) * page, to = (address + bytes) / page * page;
    if (to - from >= 2 * page) madvise(reinterpret_cast<void*>(from), size_t(to - from), MADV_HUGEPAGE);  // a hint
#else
    (void)address, (void)bytes;
#endif
}

// Items of about one unit each, grouped where they are smaller. units: where each group of items starts, and the end.
struct DampenLaunch::Schedule {
    std::vector<Item> items;
    std::vector<int64_t> units;
    bool merges = false;

    Schedule(const Table& table, const Merging& merging, int theta_kind, int threads) {
        const int64_t fisher = kind_bytes[table.fisher_kind];
        const int64_t node = 2 * kind_bytes[theta_kind] + fisher;  // bytes per element; those of the sources once per tile
        const int64_t source = table.gradients == nullptr ? fisher : 2 * fisher;
        int64_t total = 0;
        for (int64_t r = 0; r < table.row_count; ++r) {
            const int64_t* row = table.rows + 5 * r;
            total += row[0] * (row[4] * node + row[2] * source);
        }
        const int64_t unit = unit_bytes(total, threads);

        int64_t in_unit = unit;  // so that the first item opens a unit
        for (int64_t r = 0; r < table.row_count; ++r) {
            const int64_t* row = table.rows + 5 * r;
            const int64_t numel = row[0], nodes = row[4], bytes = nodes * node + row[2] * source;
            merges |= needs_merge(table, merging, row);
            const int64_t step = tile * std::max<int64_t>(1, unit / (bytes * tile));
            for (int64_t from = 0; from < numel; from += step) {
                const int64_t to = std::min(from + step, numel);
                const int64_t parts = std::clamp<int64_t>((to - from) * nodes * node / unit, 1, nodes);
                const int64_t share = divide_up(nodes, parts);
                for (int64_t first = 0; first < nodes; first += share) {
                    if (in_unit >= unit) {
                        units.push_back(int64_t(items.size()));
                        in_unit = 0;
                    }
                    const int64_t last = std::min(first + share, nodes);
                    items.push_back({r, from, to, first, last});
                    in_unit += (to - from) * ((last - first) * node + row[2] * source);
                }
            }
        }
        units.push_back(int64_t(items.size()));
    }
};

DampenLaunch::DampenLaunch(const Table& table, const Merging& merging, const Limits& limits, int threads)
    : table_(table),
      merging_(merging),
      limits_(limits),
      threads_(threads),
      schedule_(new Schedule(table, merging, limits.theta_kind, threads)) {}

DampenLaunch::~DampenLaunch() = default;

void DampenLaunch::run(const Kernels& kernels, int64_t* counts, bool write) const {
    const Schedule& schedule = *schedule_;
    const int64_t unit_count = int64_t(schedule.units.size()) - 1;
    const int threads = int(std::min<int64_t>(threads_, unit_count));

    const int64_t theta_bytes = kind_bytes[limits_.theta_kind], fisher_bytes = kind_bytes[table_.fisher_kind];
    const DampenLoop dampen = kernels.dampen[limits_.theta_kind][table_.fisher_kind];
    const DampenMergingLoop dampen_merging = kernels.dampen_merging[limits_.theta_kind][table_.fisher_kind];
    const MergeLoop merge = kernels.merge[table_.fisher_kind];
    const bool with_sign = table_.gradients != nullptr;
    const int64_t scratch_bytes = schedule.merges ? (with_sign ? 2 : 1) * tile * fisher_bytes : 0;
    // of this run alone; nothing is allocated on the threads, where nothing may throw
    const std::unique_ptr<double[]> scratch(new double[size_t(threads * scratch_bytes / int64_t(sizeof(double)))]);

    const Dampening how{limits_.exponent, limits_.cap, write};

    auto do_unit = [&](int64_t u, int thread) {
        char* const mine = reinterpret_cast<char*>(scratch.get()) + thread * scratch_bytes;
        char* const gradient_of_mine = mine + tile * fisher_bytes;  // where there are gradients
        Tally tally(counts);
        for (int64_t i = schedule.units[u]; i < schedule.units[u + 1]; ++i) {
            const Item& item = schedule.items[i];
            const int64_t* row = table_.rows + 5 * item.row;
            const Sources sources{table_.sources + row[1], table_.weights + row[1], row[2], merging_.how, merging_.scale};
            const int64_t* const targets = table_.targets + 3 * row[3];
            const auto apply = [&](int64_t at, auto&& loop) {  // to all targets of the item, from element `at` on
                for (int64_t t = item.first; t < item.last; t += nodes_at_once) {
                    Node nodes[nodes_at_once];
                    const int count = int(std::min<int64_t>(nodes_at_once, item.last - t));
                    for (int i = 0; i < count; ++i) {
                        const int64_t* target = targets + 3 * (t + i);
                        nodes[i] = {reinterpret_cast<char*>(target[0]) + at * theta_bytes,
                                    reinterpret_cast<const char*>(target[1]) + at * fisher_bytes,
                                    limits_.alpha[target[2]], limits_.lam[target[2]]};
                    }
                    if (!loop(nodes, count)) return false;
                    for (int i = 0; i < count; ++i) tally.add(targets[3 * (t + i) + 2], nodes[i].counts);
                }
                return true;
            };
            const auto beside = [&](int64_t at) {  // the first gradient of a signed row, from element `at` on
                return reinterpret_cast<const char*>(table_.gradients[row[1]]) + at * fisher_bytes;
            };
            const int64_t length = item.to - item.from;
            if (!needs_merge(table_, merging_, row)) {
                const char* const merged = reinterpret_cast<const char*>(sources.addresses[0]) + item.from * fisher_bytes;
                const char* const gradient = with_sign ? beside(item.from) : nullptr;
                apply(item.from, [&](Node* nodes, int count) {
                    return dampen(nodes, count, merged, gradient, length, how), true;
                });
                continue;
            }
            const auto while_merging = [&](Node* nodes, int count) {
                return dampen_merging(nodes, count, sources, item.from, length, how);
            };
            if (!with_sign && item.last - item.first <= merges_again && apply(item.from, while_merging)) continue;
            for (int64_t at = item.from; at < item.to; at += tile) {
                const int64_t n = std::min(tile, item.to - at);
                merge(mine, sources.addresses, sources.weights, sources.count, at, n, sources.how, sources.scale);
                const char* gradient = with_sign ? beside(at) : nullptr;
                if (with_sign && adds(table_, row)) {
                    const int sum = int(common::Merge::sum);
                    merge(gradient_of_mine, table_.gradients + row[1], sources.weights, sources.count, at, n, sum, 1);
                    gradient = gradient_of_mine;
                }
                apply(at, [&](Node* nodes, int count) { return dampen(nodes, count, mine, gradient, n, how), true; });
            }
        }
    };
    share_out(unit_count, threads, do_unit);
}

void run_merge(const Kernels& kernels, int fisher_kind, const int64_t* sources, const double* weights, int64_t count,
               int merge, double scale, int64_t out, int64_t n, int threads) {
    const int64_t bytes = kind_bytes[fisher_kind];
    const int64_t step = divide_up(unit_bytes(n * bytes * (count + 1), threads), bytes * (count + 1));
    expect_writes(out, n * bytes);
    auto do_part = [&](int64_t part, int) {
        const int64_t from = part * step, length = std::min(step, n - from);
        kernels.merge[fisher_kind](reinterpret_cast<char*>(out) + from * bytes, sources, weights, count, from, length,
                                   merge, scale);
    };
    share_out(divide_up(n, step), threads, do_part);
}

void run_accumulate(const Kernels& kernels, const int64_t* pairs, int64_t pair_count, bool square, bool zero,
                    int threads) {
    const auto bytes_of = [&](const int64_t* pair) {
        return (zero ? 2 : 1) * kind_bytes[pair[3]] + 2 * kind_bytes[pair[4]];
    };
    int64_t total = 0;
    for (int64_t p = 0; p < pair_count; ++p) total += pairs[5 * p + 2] * bytes_of(pairs + 5 * p);
    const int64_t unit = unit_bytes(total, threads);

    std::vector<int64_t> starts;  // pair and element at which each unit begins
    int64_t in_unit = unit;
    for (int64_t p = 0; p < pair_count; ++p) {
        const int64_t* pair = pairs + 5 * p;
        const int64_t bytes = bytes_of(pair);
        for (int64_t at = 0; at < pair[2];) {
            if (in_unit >= unit) {
                starts.insert(starts.end(), {p, at});
                in_unit = 0;
            }
            const int64_t length = std::min(pair[2] - at, divide_up(unit - in_unit, bytes));
            in_unit += length * bytes;
            at += length;
        }
    }
    starts.insert(starts.end(), {pair_count, 0});

    auto do_unit = [&](int64_t u, int) {
        const int64_t last_pair = starts[2 * u + 2], end = starts[2 * u + 3];
        int64_t at = starts[2 * u + 1];
        for (int64_t p = starts[2 * u]; p < last_pair || (p == last_pair && at < end); ++p, at = 0) {
            const int64_t* pair = pairs + 5 * p;
            const int64_t stop = p == last_pair ? end : pair[2];
            char* const gradient = reinterpret_cast<char*>(pair[0]) + at * kind_bytes[pair[3]];
            char* const into = reinterpret_cast<char*>(pair[1]) + at * kind_bytes[pair[4]];
            kernels.accumulate[pair[3]][pair[4]](into, gradient, stop - at, square, zero);
        }
    };
    share_out(int64_t(starts.size()) / 2 - 1, threads, do_unit);
}

}  // namespace fiun
