// What host and device share: the arguments of each kernel. The arrays of `dampen` and `histogram` are uploaded by
// fiun_fast/kernels/cuda.py, their tiles cut by schedule.py; the spans of `merge`, `accumulate` and `add_squares` are
// cut by run.cu. All addresses and offsets are int64. Dtypes and sizes are checked in Python, not here.
#pragma once

#include <stdint.h>

#include "../kinds.h"

namespace fiun {

constexpr int warp_threads = 32;
constexpr int block_threads = 128;
constexpr int block_warps = block_threads / warp_threads;

// In a step a lane holds two 16-byte accesses of the wider dtype of a launch; more would cost the registers of other
// warps. They form units of consecutive elements, 16 bytes of the narrower dtype (8 where half precision meets double).
constexpr int lane_elements(int wider_bytes) { return 32 / wider_bytes; }
constexpr int unit_elements(int wider_bytes, int narrower_bytes) {
    return lane_elements(wider_bytes) < 16 / narrower_bytes ? lane_elements(wider_bytes) : 16 / narrower_bytes;
}
constexpr int scalar_lane_elements = 4;  // where addresses are not multiples of 16, and a unit is one element

// ---- dampen --------------------------------------------------------------------------------------------------------

// A tile is the work of one warp: `length` elements of a row, for some of the row's nodes. Lane n of the warp keeps the
// counts of the tile's n-th node, hence at most 32 of them.
struct Tile {
    int64_t start;         // in the row, in elements
    int64_t first_source;  // the row's forget Fishers
    int64_t first_target;  // the nodes of this tile
    int32_t length, sources, targets;
    int32_t vector;  // 1: at `start` all addresses are multiples of 16, and so is the length in bytes
};

struct Target {
    int64_t theta, original, node;  // addresses at the start of the row (theta: 0 where there is none); row of `counts`
};

struct DampenArgs {
    const Tile* tiles;
    int64_t tile_count;
    const int64_t* sources;    // addresses of forget Fishers at the start of their row
    const int64_t* gradients;  // of the gradients beside them; null: unsigned
    const void* weights;       // one per source, in the Fishers' dtype, as all numbers below
    const Target* targets;
    const void* limits;  // alpha and lambda of each target
    int64_t* counts;     // [nodes, 3]: selected, zeroed, nonfinite; added to
    double scale, exponent, cap;
    int merge;
    bool write;  // false: only count
};

// ---- histogram -----------------------------------------------------------------------------------------------------

// A run is several tiles, all of one and the same node: the work of a warp between two additions to `counts`.
struct HistogramArgs {
    const Tile* tiles;    // in the order of the nodes
    const int64_t* runs;  // [run_count + 1]: the first tile of each, and the end
    int64_t run_count;
    const int64_t* sources;  // as in DampenArgs, the next three as well
    const int64_t* gradients;
    const void* weights;
    const Target* targets;
    const int64_t* bases;  // [nodes]
    int64_t* counts;       // [nodes, histogram_bins]; added to
    double scale;
    int merge, low;
    bool nearest;
};

// ---- merge and accumulate: their tables travel as kernel arguments, so that no call uploads or allocates --------------

// Contiguous elements that all take the same path.
struct Span {
    int64_t start, length;
    int64_t first_tile;
    bool vector;  // as in Tile
};

// The spans of a launch, cut into tiles that are numbered from span to span.
template <int most>
struct Walk {
    Span spans[most];
    int64_t tile_count;
    int span_count, tile_elements;
};

constexpr int merge_sources = 192;  // with more, `out` is the first source of a further launch
struct MergeArgs {
    int64_t out;
    int64_t sources[merge_sources];
    double weights[merge_sources];
    int count;      // of sources in this launch
    int64_t total;  // of sources in all launches, for the mean
    int merge;
    bool finish;  // the last launch: divide and scale
    double scale;
    Walk<3> walk;
};

constexpr int accumulate_spans = 80;
struct AccumulateArgs {
    int64_t gradients[accumulate_spans], into[accumulate_spans];  // addresses of the tensors that the spans are parts of
    Walk<accumulate_spans> walk;
    bool square, zero;
};

// ---- squares: the epilogue of a batched product ---------------------------------------------------------------------

struct SquaresArgs {
    int64_t into, products;  // into [n] += sum over r of products [rows, n] squared
    int64_t rows, n;
    Walk<3> walk;
};

static_assert(sizeof(MergeArgs) <= 4096 && sizeof(AccumulateArgs) <= 4096, "kernel arguments are limited to 4 KiB");

}  // namespace fiun
