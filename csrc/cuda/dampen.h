// The dampening kernel. A warp takes a tile, merges its forget Fishers once, keeps the result in registers and applies it
// to the tile's nodes one after another. Parameters are read and written only in units that hold something selected; with
// gradients they are read wherever something is above the threshold, because their sign decides as well.
//
// A node's turn begins with a look: is anything selected in the warp, is any number not finite? Where neither is, the turn
// is over. Else numbers are counted and dampened, by quick.h where they allow that.
#pragma once

#include <type_traits>

#include "quick.h"
#include "run.h"

namespace fiun {
namespace FIUN_ISA {

constexpr unsigned whole_warp = 0xffffffffu;

// How a lane holds parameters: halves two in a word where it has an even number, so that nothing unpacks and packs them.
template <class T, int unit>
struct Held {
    static constexpr bool pairs = sizeof(T) == 2 && unit % 2 == 0;
    using type = std::conditional_t<pairs, uint32_t, T>;
    static constexpr int count = pairs ? unit / 2 : unit;
};

// One node's parameters in the units where `chosen` has a bit, one bit per element; 0 in the others.
template <int unit, int units, int count, class T, class V>
FIUN_DEVICE void load_theta(const T* theta, unsigned chosen, V (&values)[units][count]) {
    constexpr unsigned whole = (1u << unit) - 1;
#pragma unroll
    for (int u = 0; u < units; ++u) {
        clear(values[u]);
        if (!(chosen >> (u * unit) & whole)) continue;
        load<false>(reinterpret_cast<const V*>(theta + u * warp_threads * unit), values[u]);
    }
}

// Dampens the values loaded from theta where `chosen` has a bit; returns how many became 0.
template <bool with_exponent, int unit, int units, class T, class F>
FIUN_DEVICE int dampen_units(T* theta, T (&values)[units][unit], const F (&original)[units][unit],
                             const F (&merged)[units][unit], const Rule<F>& rule, unsigned chosen, bool write) {
    constexpr unsigned whole = (1u << unit) - 1;
    int zeroed = 0;
#pragma unroll
    for (int u = 0; u < units; ++u) {
        if (!(chosen >> (u * unit) & whole)) continue;
#pragma unroll
        for (int i = 0; i < unit; ++i) {
            const bool here = chosen >> (u * unit + i) & 1;
            T damped = values[u][i];
            if (!with_exponent || here) {  // the power costs more than a branch
                // where nothing is selected, 1 spares the division its slow path for zeros and subnormals
                const F factor = dampening<with_exponent>(original[u][i], here ? merged[u][i] : F(1), rule);
                damped = dampened(damped, factor);
            }
            zeroed += here && is_zero(damped);
            values[u][i] = pick(here, damped, values[u][i]);
        }
        if (write) store(theta + u * warp_threads * unit, values[u]);
    }
    return zeroed;
}

template <int unit, int units, class F>
FIUN_DEVICE void load_original(const Target* target, int64_t at, int left, F (&original)[units][unit]) {
    constexpr int stride = warp_threads * unit;
    const F* from = reinterpret_cast<const F*>(__ldg(&target->original)) + at;
#pragma unroll
    for (int u = 0; u < units; ++u) {
        clear(original[u]);
        if (u * stride < left) load<false>(from + u * stride, original[u]);
    }
}

// x, of which nothing may be computed before this point: else the compiler prepares for all nodes what few turns need.
FIUN_DEVICE float not_before(float x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+f"(x));
#endif
    return x;
}
FIUN_DEVICE double not_before(double x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+d"(x));
#endif
    return x;
}

// ---- prefetching: where memory is fast, loads alone would not keep it busy ---------------------------------------------

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
constexpr bool prefetches = true;
#else
constexpr bool prefetches = false;  // GDDR: what 48 warps load is enough, and the L2 cache of some is small
#endif
constexpr int group = 4;  // nodes that are asked for at once, 8 lines each

// Asks for two steps from element `at` on of what most steps wait for: the first forget Fisher, the first node's own.
template <class F>
FIUN_DEVICE void prefetch_steps(const int64_t* sources, const Target* target, int64_t at, int left) {
    const int64_t base = lane_index() < 16 ? *sources : target->original;
    prefetch_line(base + at * int64_t(sizeof(F)), lane_index() % 16, left * int(sizeof(F)));
}

// One step of the next nodes.
template <class F>
FIUN_DEVICE void prefetch_nodes(const Target* targets, int count, int64_t at, int left) {
    const int node = lane_index() / 8;
    if (node >= count) return;
    prefetch_line(targets[node].original + at * int64_t(sizeof(F)), lane_index() % 8, left * int(sizeof(F)));
}

template <bool with_exponent, bool with_sign, int unit, int units, class T, class F>
FIUN_DEVICE void dampen_tile(const DampenArgs& args, const Tile& tile) {
    constexpr int lane_numbers = unit * units, step = step_elements<unit, units>;
    constexpr bool maybe_quick = has_quick<F> && !with_exponent;
    const int lane = lane_index();
    const Target* const targets = args.targets + tile.first_target;
    const F* const limits = static_cast<const F*>(args.limits) + 2 * tile.first_target;
    unsigned selected_here = 0, zeroed_here = 0, nonfinite_here = 0;  // of node number `lane`
#pragma unroll 1
    for (int done = 0; done < tile.length; done += step) {
        const int64_t at = tile.start + done + lane * unit;
        const int left = tile.length - done - lane * unit;
        F original[units][unit], merged[units][unit];
        load_original(targets, at, left, original);
        if (unit > 1 && prefetches && done / step % 2 == 0) {
            const int next = done + 2 * step;
            prefetch_steps<F>(args.sources + tile.first_source, targets, tile.start + next,
                              smaller_of(tile.length - next, 2 * step));
        }
        merge_units<true>(args.sources + tile.first_source, static_cast<const F*>(args.weights) + tile.first_source,
                          tile.sources, Merge(args.merge), at, left, merged);
        finish_units(tile.sources, F(args.scale), Merge(args.merge), merged);
        F gradient[units][unit];
        if constexpr (with_sign) {
            merge_units<true>(args.gradients + tile.first_source, static_cast<const F*>(args.weights) + tile.first_source,
                              tile.sources, Merge::sum, at, left, gradient);
        }
        // of the merged numbers, once for all nodes
        const F* const m = &merged[0][0];
        bool finite = all_finite<lane_numbers>(m);
        if constexpr (with_sign) finite &= all_finite<lane_numbers>(&gradient[0][0]);
        const bool divisors = maybe_quick & finite & all_are_divisors<lane_numbers>(m);
        float inverse[units][unit];
        if constexpr (maybe_quick) {
#pragma unroll
            for (int i = 0; i < lane_numbers; i += 2) {
                const Two r = reciprocals(two_of(m + i));
                (&inverse[0][0])[i] = r.a, (&inverse[0][0])[i + 1] = r.b;
            }
        }
        // One node's turn; when it is over, its I is not needed any more, and the next node's is on its way.
        const auto turn = [&](int n) {
            F limit[2];  // alpha and lambda
            load<true>(limits + 2 * n, limit);
            const Rule<F> rule{limit[0], limit[1], F(args.exponent), F(args.cap)};
            const F* const o = &original[0][0];
            const Look<lane_numbers, F> look = looked_at<lane_numbers>(o, m, rule);
            const bool usual = finite & look.finite;
            if (!__any_sync(whole_warp, look.above | !usual)) {
                if (n + 1 < tile.targets) load_original(targets + n + 1, at, left, original);
                return;
            }
            bool quick = false;
            unsigned chosen = 0, nonfinite = 0;
            if constexpr (maybe_quick) {
                quick = __all_sync(whole_warp, divisors & usual & all_are_dividends<lane_numbers>(o, rule));
                if (quick) chosen = selected_bits(look);
            }
            if (!quick) {
#pragma unroll
                for (int i = 0; i < lane_numbers; ++i) {
                    chosen |= unsigned(is_selected(o[i], m[i], rule)) << i;
                    bool all = is_finite(o[i]) && is_finite(not_before(m[i]));
                    if constexpr (with_sign) all = all && is_finite(not_before((&gradient[0][0])[i]));
                    nonfinite += !all;
                }
            }
            T* const theta = reinterpret_cast<T*>(__ldg(&targets[n].theta)) + at;
            typename Held<T, unit>::type values[units][Held<T, unit>::count];
            load_theta<unit>(theta, chosen, values);
            T singles[units][unit];  // the same
            memcpy(singles, values, sizeof(values));
            if constexpr (with_sign) chosen &= opposed_units(gradient, singles);
            unsigned zeroed = 0;
            if constexpr (maybe_quick) {
                if (quick) {
                    zeroed = dampen_units_quickly<unit>(theta, values, original, merged, inverse, rule, chosen, args.write);
                }
            }
            if (!quick) zeroed = dampen_units<with_exponent>(theta, singles, original, merged, rule, chosen, args.write);
            if (n + 1 < tile.targets) load_original(targets + n + 1, at, left, original);
            // at most 256 of each, so that one reduction serves all three
            const unsigned counts = __reduce_add_sync(whole_warp, unsigned(__popc(chosen)) | zeroed << 10 | nonfinite << 20);
            if (lane == n) {
                selected_here += counts & 1023;
                zeroed_here += counts >> 10 & 1023;
                nonfinite_here += counts >> 20;
            }
        };
        int n = 0;
#pragma unroll 1
        for (int end = smaller_of(group, tile.targets); n < tile.targets; end = smaller_of(end + group, tile.targets)) {
            if (unit > 1 && prefetches) {
                prefetch_nodes<F>(targets + end, tile.targets - end, tile.start + done, smaller_of(tile.length - done, step));
            }
#pragma unroll 1
            for (; n < end; ++n) turn(n);
        }
    }
    if (lane >= tile.targets) return;
    auto* counts = reinterpret_cast<unsigned long long*>(args.counts + 3 * targets[lane].node);
    if (selected_here) atomicAdd(counts, selected_here);
    if (zeroed_here) atomicAdd(counts + 1, zeroed_here);
    if (nonfinite_here) atomicAdd(counts + 2, nonfinite_here);
}

// Blocks that share a multiprocessor, by what registers there are for: more of them would spill. Blackwell's pairs of
// numbers need pairs of registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int unsigned_blocks = 4;
#else
constexpr int unsigned_blocks = 5;
#endif
template <bool with_sign, class T, class F>
constexpr int blocks_at_once = sizeof(F) == 8 ? (with_sign ? 2 : 4) : (with_sign || sizeof(T) == 8 ? 4 : unsigned_blocks);

template <bool with_exponent, bool with_sign, class T, class F>
__global__ void __launch_bounds__(block_threads, blocks_at_once<with_sign, T, F>)
    dampen(const __grid_constant__ DampenArgs args) {
    for (int64_t t = warp_index(); t < args.tile_count; t += warp_total()) {
        const Tile tile = args.tiles[t];
        if (tile.vector) {
            dampen_tile<with_exponent, with_sign, Shape<T, F>::unit, Shape<T, F>::units, T, F>(args, tile);
        } else {
            dampen_tile<with_exponent, with_sign, 1, scalar_lane_elements, T, F>(args, tile);
        }
    }
}

template <bool with_sign, class F>
DampenKernel dampen_kernel(int theta_kind, bool with_exponent) {
    static constexpr DampenKernel kernels[theta_kinds][2] = {
        {dampen<false, with_sign, float, F>, dampen<true, with_sign, float, F>},
        {dampen<false, with_sign, double, F>, dampen<true, with_sign, double, F>},
        {dampen<false, with_sign, bf16, F>, dampen<true, with_sign, bf16, F>},
        {dampen<false, with_sign, fp16, F>, dampen<true, with_sign, fp16, F>}};
    return kernels[theta_kind][with_exponent];
}

}  // namespace FIUN_ISA
}  // namespace fiun
