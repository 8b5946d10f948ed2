// The kernels that walk through spans: merge several Fishers into one, accumulate gradients into a Fisher.
#include "lanes.h"
#include "run.h"

namespace fiun {
namespace FIUN_ISA {

template <class F>
struct MergeStep {
    const MergeArgs& args;

    FIUN_DEVICE void enter(int) const {}

    template <int unit, int units>
    FIUN_DEVICE static void add(const F (&loaded)[units][unit], F weight, Merge how, bool first, F (&merged)[units][unit]) {
#pragma unroll
        for (int u = 0; u < units; ++u) {
#pragma unroll
            for (int i = 0; i < unit; ++i) {
                merged[u][i] = first ? loaded[u][i] * weight : merged_with(merged[u][i], loaded[u][i], weight, how);
            }
        }
    }

    template <int unit, int units>
    FIUN_DEVICE void step(int64_t at, int left) const {
        constexpr int stride = warp_threads * unit;
        const Merge how = Merge(args.merge);
        F merged[units][unit];
#pragma unroll 1
        for (int k = 0; k < args.count; k += 2) {  // both are on their way before the first is used
            F first[units][unit], second[units][unit];
            load_source<false>(args.sources[k], at, left, first);
            if (k + 1 < args.count) load_source<false>(args.sources[k + 1], at, left, second);
            add(first, F(args.weights[k]), how, k == 0, merged);
            if (k + 1 < args.count) add(second, F(args.weights[k + 1]), how, false, merged);
        }
        if (args.finish) finish_units(args.total, F(args.scale), how, merged);
        F* out = reinterpret_cast<F*>(args.out) + at;
#pragma unroll
        for (int u = 0; u < units; ++u) {
            if (u * stride < left) store(out + u * stride, merged[u]);
        }
    }
};

// Blocks on a multiprocessor: with eight, ptxas spills before sm_100, and there in double.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class F>
constexpr int merge_blocks = sizeof(F) == 4 ? 8 : 6;
#else
template <class F>
constexpr int merge_blocks = 6;
#endif
template <class F>
__global__ void __launch_bounds__(block_threads, merge_blocks<F>) merge(const __grid_constant__ MergeArgs args) {
    MergeStep<F> body{args};
    walk_all<F, F>(args.walk, body);
}

template <class T, class F>
struct AccumulateStep {
    const AccumulateArgs& args;
    T* gradient;
    F* into;

    FIUN_DEVICE void enter(int span) {
        gradient = reinterpret_cast<T*>(args.gradients[span]);
        into = reinterpret_cast<F*>(args.into[span]);
    }

    template <int unit, int units>
    FIUN_DEVICE void step(int64_t at, int left) const {
        constexpr int stride = warp_threads * unit;
        T g[units][unit];
        F total[units][unit];
#pragma unroll
        for (int u = 0; u < units; ++u) {
            clear(g[u]);
            clear(total[u]);
            if (u * stride < left) {
                load<false>(gradient + at + u * stride, g[u]);
                load<false>(into + at + u * stride, total[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < units; ++u) {
            if (u * stride >= left) break;
#pragma unroll
            for (int i = 0; i < unit; ++i) total[u][i] = accumulated(total[u][i], F(widen(g[u][i])), args.square);
            store(into + at + u * stride, total[u]);
            clear(g[u]);
            if (args.zero) store(gradient + at + u * stride, g[u]);
        }
    }
};

// Blocks on a multiprocessor: left to itself, ptxas saves registers by loading late, where nothing is gained by that.
template <class T, class F>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 2 ? 12 : 8) accumulate(const __grid_constant__ AccumulateArgs args) {
    AccumulateStep<T, F> body{args, nullptr, nullptr};
    walk_all<T, F>(args.walk, body);
}

}  // namespace FIUN_ISA

MergeKernel merge_kernel(int fisher_kind) {
    using namespace FIUN_ISA;
    static constexpr MergeKernel kernels[fisher_kinds] = {merge<float>, merge<double>};
    return kernels[fisher_kind];
}

AccumulateKernel accumulate_kernel(int gradient_kind, int fisher_kind) {
    using namespace FIUN_ISA;
    static constexpr AccumulateKernel kernels[theta_kinds][fisher_kinds] = {
        {accumulate<float, float>, accumulate<float, double>},
        {accumulate<double, float>, accumulate<double, double>},
        {accumulate<bf16, float>, accumulate<bf16, double>},
        {accumulate<fp16, float>, accumulate<fp16, double>}};
    return kernels[gradient_kind][fisher_kind];
}

}  // namespace fiun
