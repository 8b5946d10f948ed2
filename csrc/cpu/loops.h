// The innermost loops, compiled once for each instruction set into its own namespace (see element.h). Nothing from the
// standard library is used here: its inline functions would be compiled for that instruction set under a shared name.
// The compiler vectorises: the bodies are free of branches, and the lane counts are constants.
#include "../element.h"
#include "kernels.h"

#if defined(__GNUC__)
#define FIUN_RESTRICT __restrict__
#define FIUN_ALWAYS_INLINE inline __attribute__((always_inline))
#define FIUN_KEEP_LOOP _Pragma("GCC unroll 1")  // else GCC unrolls loops over a few lanes before it can vectorise them
#define FIUN_UNROLL _Pragma("GCC unroll 16")
#define FIUN_PREFETCH(address) __builtin_prefetch(address)  // no function: GCC would drop calls of one that does nothing
#else
#define FIUN_RESTRICT __restrict
#define FIUN_ALWAYS_INLINE inline
#define FIUN_KEEP_LOOP
#define FIUN_UNROLL
#define FIUN_PREFETCH(address) (void)(address)
#endif

// in this order: each needs those before it
#include "vector.h"
#include "halves.h"
#include "merge.h"
#include "dampen.h"
#include "squares.h"

namespace fiun {
namespace FIUN_ISA {

template <bool square, bool zero, class T, class F>
inline void accumulate_all(F* FIUN_RESTRICT into, T* FIUN_RESTRICT gradient, int64_t n) {
    int64_t i = 0;
    if constexpr (has_vectors<T, F>) {
        for (; i + lanes<F> <= n; i += lanes<F>) {
            const Vector<F> g = widened(gradient + i);
            store(into + i, load(into + i) + (square ? g * g : positive(g)));
            if (zero) memset(static_cast<void*>(gradient + i), 0, sizeof(T) * lanes<F>);
        }
    }
    for (; i < n; ++i) {
        into[i] = accumulated(into[i], F(widen(gradient[i])), square);
        if (zero) gradient[i] = T{};
    }
}

template <class T, class F>
void accumulate(void* into, void* gradient, int64_t n, bool square, bool zero) {
    const auto all = square ? (zero ? accumulate_all<true, true, T, F> : accumulate_all<true, false, T, F>)
                            : (zero ? accumulate_all<false, true, T, F> : accumulate_all<false, false, T, F>);
    all(static_cast<F*>(into), static_cast<T*>(gradient), n);
}

template <class F>
void histogram(const void* original, const void* merged, int64_t n, int low, int64_t base, bool nearest, int32_t* bins) {
    const F* FIUN_RESTRICT i = static_cast<const F*>(original);
    const F* FIUN_RESTRICT m = static_cast<const F*>(merged);
    const auto first = typename BitsOf<F>::type(base);
    for (int64_t j = 0; j < n; ++j) bins[j] = int32_t(ratio_bin(i[j], m[j], low, first, nearest));
}

template <class T, class F>
void admit(const void* theta, const void* gradient, int64_t n, int32_t* bins) {
    const T* FIUN_RESTRICT t = static_cast<const T*>(theta);
    const F* FIUN_RESTRICT g = static_cast<const F*>(gradient);
    for (int64_t j = 0; j < n; ++j) bins[j] = is_opposed(g[j], t[j]) ? bins[j] : int32_t(histogram_bins);
}

extern const Kernels kernels;
const Kernels kernels = {
    FIUN_ISA_NAME,
    {{dampen<float, float>, dampen<float, double>},
     {dampen<double, float>, dampen<double, double>},
     {dampen<bf16, float>, dampen<bf16, double>},
     {dampen<fp16, float>, dampen<fp16, double>}},
    {{dampen_merging<float, float>, dampen_merging<float, double>},
     {dampen_merging<double, float>, dampen_merging<double, double>},
     {dampen_merging<bf16, float>, dampen_merging<bf16, double>},
     {dampen_merging<fp16, float>, dampen_merging<fp16, double>}},
    {merge<float>, merge<double>},
    {{accumulate<float, float>, accumulate<float, double>},
     {accumulate<double, float>, accumulate<double, double>},
     {accumulate<bf16, float>, accumulate<bf16, double>},
     {accumulate<fp16, float>, accumulate<fp16, double>}},
    {histogram<float>, histogram<double>},
    {{admit<float, float>, admit<float, double>},
     {admit<double, float>, admit<double, double>},
     {admit<bf16, float>, admit<bf16, double>},
     {admit<fp16, float>, admit<fp16, double>}},
    {add_squares<float>, add_squares<double>},
    outer_square,
    tile_rows,
    tile_columns,
};

}  // namespace FIUN_ISA
}  // namespace fiun
