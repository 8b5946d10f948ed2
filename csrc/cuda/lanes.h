// How a warp walks through contiguous memory. In a step each lane holds some elements of every stream in registers, as
// units of consecutive elements: a unit is one or more 16-byte accesses, or a single element where addresses are
// not multiples of 16. Neighbouring lanes have neighbouring units. All loads of a step are issued before any is used.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../element.h"
#include "tables.h"
#include "two.h"

namespace fiun {
namespace FIUN_ISA {

FIUN_HD constexpr int smaller_of(int a, int b) { return a < b ? a : b; }
FIUN_HD constexpr int larger_of(int a, int b) { return a > b ? a : b; }

template <class A, class B>
struct Shape {
    static constexpr int narrow = smaller_of(sizeof(A), sizeof(B)), wide = larger_of(sizeof(A), sizeof(B));
    static constexpr int unit = unit_elements(wide, narrow), units = lane_elements(wide) / unit;
};

template <int unit, int units>
constexpr int step_elements = warp_threads * unit * units;

template <int bytes>
struct Word;
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned int;
};
template <>
struct Word<8> {
    using type = unsigned long long;
};
template <>
struct Word<16> {
    using type = uint4;
};

template <class T, int n>
struct Access {
    static constexpr int bytes = smaller_of(16, int(sizeof(T)) * n);
    static constexpr int count = int(sizeof(T)) * n / bytes;
    // one double is no word: cast to and fro, it would leave stores to local memory behind that nobody reads
    using type = std::conditional_t<std::is_same_v<T, double> && bytes == 8, double, typename Word<bytes>::type>;
};

// shared: nothing writes the data during the launch, and neighbouring tiles may read it again. Other data is used once
// and passes through the caches marked to be evicted first.
template <bool shared, class T, int n>
FIUN_DEVICE void load(const T* from, T (&to)[n]) {
    using A = Access<T, n>;
    const auto* words_from = reinterpret_cast<const typename A::type*>(from);
    typename A::type words[A::count];
#pragma unroll
    for (int i = 0; i < A::count; ++i) words[i] = shared ? __ldg(words_from + i) : __ldcs(words_from + i);
    memcpy(to, words, sizeof(words));
}

template <class T, int n>
FIUN_DEVICE void store(T* to, const T (&from)[n]) {
    using A = Access<T, n>;
    typename A::type words[A::count];
    memcpy(words, from, sizeof(words));
#pragma unroll
    for (int i = 0; i < A::count; ++i) __stcs(reinterpret_cast<typename A::type*>(to) + i, words[i]);
}

template <class T, int n>
FIUN_DEVICE void clear(T (&values)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = T{};
}

FIUN_DEVICE int lane_index() { return int(threadIdx.x) % warp_threads; }

// Warps of the grid: warp 0 of every block, then warp 1 and so on, so that few tiles are spread over all processors.
FIUN_DEVICE int64_t warp_index() { return int64_t(threadIdx.x / warp_threads) * gridDim.x + blockIdx.x; }
FIUN_DEVICE int64_t warp_total() { return int64_t(gridDim.x) * block_warps; }

// ---- merging -------------------------------------------------------------------------------------------------------

// merged = reduce_k (w_k F_k) of this lane's units, which begin at element `at` and lie `stride` elements apart; 0 beyond
// `left`, the elements from the first unit to the end. `shared`: neighbouring tiles may read the same, nothing writes it.
template <bool shared, int unit, int units, class F>
FIUN_DEVICE void load_source(int64_t source, int64_t at, int left, F (&loaded)[units][unit]) {
    constexpr int stride = warp_threads * unit;
    const F* forget = reinterpret_cast<const F*>(source) + at;
#pragma unroll
    for (int u = 0; u < units; ++u) {
        clear(loaded[u]);
        if (u * stride < left) load<shared>(forget + u * stride, loaded[u]);
    }
}

template <bool shared, int unit, int units, class W, class F>
FIUN_DEVICE void merge_units(const int64_t* sources, const W* weights, int count, Merge how, int64_t at, int left,
                             F (&merged)[units][unit]) {
    F* const m = &merged[0][0];
    load_source<shared>(sources[0], at, left, merged);
    const F first = F(weights[0]);
    if constexpr (sizeof(F) == 4 && unit * units % 2 == 0) {
#pragma unroll
        for (int i = 0; i < unit * units; i += 2) {
            const Two both = times({float(first), float(first)}, two_of(m + i));
            m[i] = F(both.a), m[i + 1] = F(both.b);
        }
    } else {
#pragma unroll
        for (int i = 0; i < unit * units; ++i) m[i] *= first;
    }
#pragma unroll 1
    for (int k = 1; k < count; ++k) {
        F loaded[units][unit];
        load_source<shared>(sources[k], at, left, loaded);
        const F weight = F(weights[k]);
#pragma unroll
        for (int i = 0; i < unit * units; ++i) m[i] = merged_with(m[i], (&loaded[0][0])[i], weight, how);
    }
}

// Asks memory for `bytes` bytes from `address` on, which this lane's 128-byte line number `line` is part of. No register
// waits for it; what comes is in the L2 cache when it is loaded.
FIUN_DEVICE void prefetch_line(int64_t address, int line, int bytes) {
#ifdef __CUDA_ARCH__
    if (line * 128 < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"(address + line * 128));
#else
    (void)address, (void)line, (void)bytes;
#endif
}

template <int unit, int units, class F>
FIUN_DEVICE void finish_units(int64_t sources, F scale, Merge how, F (&merged)[units][unit]) {
    if (how != Merge::mean && scale == F(1)) return;
#pragma unroll
    for (int u = 0; u < units; ++u) {
#pragma unroll
        for (int i = 0; i < unit; ++i) merged[u][i] = merge_finished(merged[u][i], sources, scale, how);
    }
}

// ---- signs ----------------------------------------------------------------------------------------------------------

// One bit per element whose gradient and parameter have opposite signs.
template <int unit, int units, class T, class F>
FIUN_DEVICE unsigned opposed_units(const F (&gradient)[units][unit], const T (&values)[units][unit]) {
    unsigned opposed = 0;
#pragma unroll
    for (int u = 0; u < units; ++u) {
#pragma unroll
        for (int i = 0; i < unit; ++i) opposed |= unsigned(is_opposed(gradient[u][i], values[u][i])) << (u * unit + i);
    }
    return opposed;
}

// ---- spans ---------------------------------------------------------------------------------------------------------

// All tiles of this warp. body.enter(s) announces a span; body.template step<unit, units>(at, left) works on the lane's
// units from element `at` on, with `left` elements until the tile ends.
template <int unit, int units, class Body>
FIUN_DEVICE void walk_tile(const Span& span, int64_t tile, int64_t tile_elements, Body& body) {
    constexpr int step = step_elements<unit, units>;
    const int64_t rest = span.length - tile * tile_elements;
    const int64_t end = tile * tile_elements + (rest < tile_elements ? rest : tile_elements);
    int64_t at = tile * tile_elements + lane_index() * unit;
#pragma unroll 1
    for (; at < end; at += step) {
        const int64_t left = end - at;
        body.template step<unit, units>(span.start + at, left < step ? int(left) : step);
    }
}

template <class A, class B, int most, class Body>
FIUN_DEVICE void walk_all(const Walk<most>& walk, Body& body) {
    int s = 0;
#pragma unroll 1
    for (int64_t tile = warp_index(); tile < walk.tile_count; tile += warp_total()) {
#pragma unroll 1
        while (s + 1 < walk.span_count && tile >= walk.spans[s + 1].first_tile) ++s;
        const Span& span = walk.spans[s];
        body.enter(s);
        if (span.vector) {
            walk_tile<Shape<A, B>::unit, Shape<A, B>::units>(span, tile - span.first_tile, walk.tile_elements, body);
        } else {
            walk_tile<1, scalar_lane_elements>(span, tile - span.first_tile, walk.tile_elements, body);
        }
    }
}

}  // namespace FIUN_ISA
}  // namespace fiun
