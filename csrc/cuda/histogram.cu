// Histograms of m / I for every node of a work table, with gradients of the elements that these admit. A warp counts a run of tiles in shared memory, where additions to
// one bin cost little, and adds what it has found to the node's counts once per run.
#include "lanes.h"
#include "run.h"

namespace fiun {
namespace FIUN_ISA {

template <bool with_sign, int unit, int units, class T, class F>
FIUN_DEVICE void count_tile(const HistogramArgs& args, const Tile& tile, unsigned* counted) {
    constexpr int stride = warp_threads * unit;
    const Target& target = args.targets[tile.first_target];
    const auto base = typename BitsOf<F>::type(args.bases[target.node]);
    const F* const from = reinterpret_cast<const F*>(target.original);
    const auto* const weights = static_cast<const F*>(args.weights) + tile.first_source;
#pragma unroll 1
    for (int done = 0; done < tile.length; done += step_elements<unit, units>) {
        const int64_t at = tile.start + done + lane_index() * unit;
        const int left = tile.length - done - lane_index() * unit;
        unsigned admitted = ~0u;  // one bit per element
        if constexpr (with_sign) {
            const T* const values = reinterpret_cast<const T*>(target.theta) + at;
            F gradient[units][unit];
            T theta[units][unit];
            merge_units<true>(args.gradients + tile.first_source, weights, tile.sources, Merge::sum, at, left, gradient);
#pragma unroll
            for (int u = 0; u < units; ++u) {
                clear(theta[u]);
                if (u * stride < left) load<false>(values + u * stride, theta[u]);
            }
            admitted = opposed_units(gradient, theta);
        }
        F original[units][unit], merged[units][unit];
#pragma unroll
        for (int u = 0; u < units; ++u) {
            clear(original[u]);  // beyond the end 0 / 0, which has no bin
            if (u * stride < left) load<false>(from + at + u * stride, original[u]);
        }
        merge_units<true>(args.sources + tile.first_source, weights, tile.sources, Merge(args.merge), at, left, merged);
        finish_units(tile.sources, F(args.scale), Merge(args.merge), merged);
#pragma unroll
        for (int u = 0; u < units; ++u) {
#pragma unroll
            for (int i = 0; i < unit; ++i) {
                const auto bin = ratio_bin(original[u][i], merged[u][i], args.low, base, args.nearest);
                if (bin < histogram_bins && (!with_sign || (admitted >> (u * unit + i) & 1))) atomicAdd(counted + bin, 1u);
            }
        }
    }
}

template <bool with_sign, class T, class F>
__global__ void __launch_bounds__(block_threads, with_sign ? 4 : 0) histogram(const __grid_constant__ HistogramArgs args) {
    __shared__ unsigned counted_by[block_warps][histogram_bins];
    unsigned* const counted = counted_by[threadIdx.x / warp_threads];
    for (int b = lane_index(); b < histogram_bins; b += warp_threads) counted[b] = 0;
    __syncwarp();
    for (int64_t run = warp_index(); run < args.run_count; run += warp_total()) {
        const int64_t end = args.runs[run + 1];
        for (int64_t t = args.runs[run]; t < end; ++t) {
            const Tile tile = args.tiles[t];
            if (tile.vector) {
                count_tile<with_sign, Shape<F, F>::unit, Shape<F, F>::units, T, F>(args, tile, counted);
            } else {
                count_tile<with_sign, 1, scalar_lane_elements, T, F>(args, tile, counted);
            }
        }
        __syncwarp();
        const int64_t node = args.targets[args.tiles[args.runs[run]].first_target].node;
        auto* counts = reinterpret_cast<unsigned long long*>(args.counts + node * histogram_bins);
        for (int b = lane_index(); b < histogram_bins; b += warp_threads) {
            if (counted[b] == 0) continue;
            atomicAdd(counts + b, static_cast<unsigned long long>(counted[b]));
            counted[b] = 0;
        }
        __syncwarp();
    }
}

}  // namespace FIUN_ISA

HistogramKernel histogram_kernel(int fisher_kind) {
    using namespace FIUN_ISA;
    static constexpr HistogramKernel kernels[fisher_kinds] = {histogram<false, float, float>,
                                                              histogram<false, double, double>};
    return kernels[fisher_kind];
}

HistogramKernel histogram_signed_kernel(int theta_kind, int fisher_kind) {
    using namespace FIUN_ISA;
    static constexpr HistogramKernel kernels[theta_kinds][fisher_kinds] = {
        {histogram<true, float, float>, histogram<true, float, double>},
        {histogram<true, double, float>, histogram<true, double, double>},
        {histogram<true, bf16, float>, histogram<true, bf16, double>},
        {histogram<true, fp16, float>, histogram<true, fp16, double>}};
    return kernels[theta_kind][fisher_kind];
}

}  // namespace fiun
