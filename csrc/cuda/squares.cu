// The epilogue of outer_square_accumulate: per-sample products, left in the L2 cache by the matrix multiplication before
// it, squared and added to the Fisher.
#include "lanes.h"
#include "run.h"

namespace fiun {
namespace FIUN_ISA {

template <class F>
struct SquaresStep {
    const SquaresArgs& args;

    FIUN_DEVICE void enter(int) const {}

    template <int unit, int units>
    FIUN_DEVICE void step(int64_t at, int left) const {
        constexpr int stride = warp_threads * unit;
        F* into = reinterpret_cast<F*>(args.into) + at;
        F total[units][unit];
#pragma unroll
        for (int u = 0; u < units; ++u) {
            clear(total[u]);
            if (u * stride < left) load<false>(into + u * stride, total[u]);
        }
#pragma unroll 1
        for (int64_t r = 0; r < args.rows; ++r) {
            const F* products = reinterpret_cast<const F*>(args.products) + r * args.n + at;
            F product[units][unit];
#pragma unroll
            for (int u = 0; u < units; ++u) {
                clear(product[u]);
                if (u * stride < left) load<false>(products + u * stride, product[u]);
            }
#pragma unroll
            for (int u = 0; u < units; ++u) {
#pragma unroll
                for (int i = 0; i < unit; ++i) total[u][i] = accumulated(total[u][i], product[u][i], true);
            }
        }
#pragma unroll
        for (int u = 0; u < units; ++u) {
            if (u * stride < left) store(into + u * stride, total[u]);
        }
    }
};

// Eight blocks on a multiprocessor, 64 registers per thread: left to itself, ptxas takes 40 on sm_120, and spills.
template <class F>
__global__ void __launch_bounds__(block_threads, 8) add_squares(const __grid_constant__ SquaresArgs args) {
    SquaresStep<F> body{args};
    walk_all<F, F>(args.walk, body);
}

}  // namespace FIUN_ISA

SquaresKernel squares_kernel(int fisher_kind) {
    using namespace FIUN_ISA;
    static constexpr SquaresKernel kernels[fisher_kinds] = {add_squares<float>, add_squares<double>};
    return kernels[fisher_kind];
}

}  // namespace fiun
