// The dampening kernel. A warp takes a tile, merges its forget Fishers once, keeps the result in registers and applies it
// to the tile's nodes one after another. Parameters are read and written only in units that hold something selected; with
// gradients they are read wherever something is above the threshold, because their sign decides as well.
#pragma once

#include "lanes.h"
#include "run.h"

namespace fiun {
namespace FIUN_ISA {

// One node's parameters in the units where `chosen` has a bit, one bit per element; 0 in the others.
template <int unit, int units, class T>
FIUN_DEVICE void load_theta(const T* theta, unsigned chosen, T (&values)[units][unit]) {
    constexpr unsigned whole = (1u << unit) - 1;
#pragma unroll
    for (int u = 0; u < units; ++u) {
        clear(values[u]);
        if (chosen >> (u * unit) & whole) load<false>(theta + u * warp_threads * unit, values[u]);
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
            if (with_exponent && !here) continue;  // the power costs more than a branch
            // where nothing is selected, 1 spares the division its slow path for zeros and subnormals
            const F factor = dampening<with_exponent>(original[u][i], here ? merged[u][i] : F(1), rule);
            const T damped = dampened(values[u][i], factor);
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

template <bool with_exponent, bool with_sign, int unit, int units, class T, class F>
FIUN_DEVICE void dampen_tile(const DampenArgs& args, const Tile& tile) {
    const int lane = lane_index();
    const Target* const targets = args.targets + tile.first_target;
    const F* const limits = static_cast<const F*>(args.limits) + 2 * tile.first_target;
    unsigned selected_here = 0, zeroed_here = 0, nonfinite_here = 0;  // of node number `lane`
#pragma unroll 1
    for (int done = 0; done < tile.length; done += step_elements<unit, units>) {
        const int64_t at = tile.start + done + lane * unit;
        const int left = tile.length - done - lane * unit;
        F next[units][unit], merged[units][unit];
        load_original(targets, at, left, next);
        merge_units<true>(args.sources + tile.first_source, static_cast<const F*>(args.weights) + tile.first_source,
                          tile.sources, Merge(args.merge), at, left, merged);
        finish_units(tile.sources, F(args.scale), Merge(args.merge), merged);
        F gradient[units][unit];
        if constexpr (with_sign) {
            merge_units<true>(args.gradients + tile.first_source, static_cast<const F*>(args.weights) + tile.first_source,
                              tile.sources, Merge::sum, at, left, gradient);
        }
#pragma unroll 1
        for (int n = 0; n < tile.targets; ++n) {
            F original[units][unit];
            memcpy(original, next, sizeof(original));
            if (n + 1 < tile.targets) load_original(targets + n + 1, at, left, next);  // on its way during the rest
            const Rule<F> rule{__ldg(limits + 2 * n), __ldg(limits + 2 * n + 1), F(args.exponent), F(args.cap)};
            unsigned chosen = 0, nonfinite = 0;
#pragma unroll
            for (int u = 0; u < units; ++u) {
#pragma unroll
                for (int i = 0; i < unit; ++i) {
                    chosen |= unsigned(is_selected(original[u][i], merged[u][i], rule)) << (u * unit + i);
                    bool finite = is_finite(original[u][i]) && is_finite(merged[u][i]);
                    if constexpr (with_sign) finite = finite && is_finite(gradient[u][i]);
                    nonfinite += !finite;
                }
            }
            T values[units][unit];
            if constexpr (with_sign) {
                load_theta(reinterpret_cast<const T*>(__ldg(&targets[n].theta)) + at, chosen, values);
                chosen &= opposed_units(gradient, values);
            }
            // at most 256 of each, so that one reduction serves both
            const unsigned both = __reduce_add_sync(0xffffffffu, unsigned(__popc(chosen)) | nonfinite << 16);
            unsigned zeroed = 0;
            if (both & 0xffff) {
                T* theta = reinterpret_cast<T*>(__ldg(&targets[n].theta)) + at;
                if constexpr (!with_sign) load_theta(theta, chosen, values);
                zeroed = dampen_units<with_exponent>(theta, values, original, merged, rule, chosen, args.write);
                zeroed = __reduce_add_sync(0xffffffffu, zeroed);
            }
            if (lane == n) {
                selected_here += both & 0xffff;
                zeroed_here += zeroed;
                nonfinite_here += both >> 16;
            }
        }
    }
    if (lane >= tile.targets) return;
    auto* counts = reinterpret_cast<unsigned long long*>(args.counts + 3 * targets[lane].node);
    if (selected_here) atomicAdd(counts, selected_here);
    if (zeroed_here) atomicAdd(counts + 1, zeroed_here);
    if (nonfinite_here) atomicAdd(counts + 2, nonfinite_here);
}

// Blocks that share a multiprocessor, by what registers there are for: more of them would spill.
template <bool with_sign, class F>
constexpr int blocks_at_once = sizeof(F) == 4 ? (with_sign ? 4 : 5) : (with_sign ? 2 : 4);

template <bool with_exponent, bool with_sign, class T, class F>
__global__ void __launch_bounds__(block_threads, blocks_at_once<with_sign, F>)
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
