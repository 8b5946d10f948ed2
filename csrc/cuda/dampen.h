// The dampening kernel. A warp takes a tile, merges its forget Fishers once, keeps the result in registers and applies it
// to the tile's nodes one after another. Parameters are read and written only in units that hold something selected.
#pragma once

#include "lanes.h"
#include "run.h"

namespace fiun {
namespace FIUN_ISA {

// One node's parameters where `chosen` has a bit, one bit per element; returns how many became 0.
template <bool with_exponent, int unit, int units, class T, class F>
FIUN_DEVICE int dampen_units(T* theta, const F (&original)[units][unit], const F (&merged)[units][unit],
                             const Rule<F>& rule, unsigned chosen, bool write) {
    constexpr unsigned whole = (1u << unit) - 1;
    T values[units][unit];
#pragma unroll
    for (int u = 0; u < units; ++u) {
        clear(values[u]);
        if (chosen >> (u * unit) & whole) load<false>(theta + u * warp_threads * unit, values[u]);
    }
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

template <bool with_exponent, int unit, int units, class T, class F>
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
                    nonfinite += !(is_finite(original[u][i]) && is_finite(merged[u][i]));
                }
            }
            // at most 256 of each, so that one reduction serves both
            const unsigned both = __reduce_add_sync(0xffffffffu, unsigned(__popc(chosen)) | nonfinite << 16);
            unsigned zeroed = 0;
            if (both & 0xffff) {
                T* theta = reinterpret_cast<T*>(__ldg(&targets[n].theta)) + at;
                zeroed = dampen_units<with_exponent>(theta, original, merged, rule, chosen, args.write);
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

template <bool with_exponent, class T, class F>
__global__ void __launch_bounds__(block_threads, sizeof(F) == 4 ? 5 : 4) dampen(const __grid_constant__ DampenArgs args) {
    for (int64_t t = warp_index(); t < args.tile_count; t += warp_total()) {
        const Tile tile = args.tiles[t];
        if (tile.vector) {
            dampen_tile<with_exponent, Shape<T, F>::unit, Shape<T, F>::units, T, F>(args, tile);
        } else {
            dampen_tile<with_exponent, 1, scalar_lane_elements, T, F>(args, tile);
        }
    }
}

template <class F>
DampenKernel dampen_kernel(int theta_kind, bool with_exponent) {
    static constexpr DampenKernel kernels[theta_kinds][2] = {{dampen<false, float, F>, dampen<true, float, F>},
                                                             {dampen<false, double, F>, dampen<true, double, F>},
                                                             {dampen<false, bf16, F>, dampen<true, bf16, F>},
                                                             {dampen<false, fp16, F>, dampen<true, fp16, F>}};
    return kernels[theta_kind][with_exponent];
}

}  // namespace FIUN_ISA
}  // namespace fiun
