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
#include "dampen.h"
#include "squares.h"

namespace fiun {
namespace FIUN_ISA {

// A vector of what was merged so far, and of one more source: `merged_with` of element.h.
template <Merge how, class V>
inline V merged_lanes(V so_far, V term) {
    if constexpr (how != Merge::max) return so_far + term;
    return select(at_most(so_far, so_far), greater_of(so_far, term), so_far);  // a NaN on either side wins
}

// out = what was merged there so far (or nothing, if first), merged with K more sources, and finished if they are the
// last. All K streams are read side by side: more of memory is on its way at any time than with one after the other.
template <Merge how, int K, bool first, class F>
inline void merge_few(F* out, const F* const* sources, const F* weights, int64_t n, int64_t divisor, F scale) {
    const int64_t whole = n / lanes<F> * lanes<F>;
    Vector<F> w[K];
    for (int k = 0; k < K; ++k) w[k] = spread(weights[k]);
    const Vector<F> divisors = spread(F(divisor)), scales = spread(scale);
    for (int64_t i = 0; i < whole; i += lanes<F>) {
        Vector<F> merged = load(sources[0] + i) * w[0];
        if (!first) merged = merged_lanes<how>(load(out + i), merged);
        FIUN_UNROLL
        for (int k = 1; k < K; ++k) merged = merged_lanes<how>(merged, load(sources[k] + i) * w[k]);
        if (how != Merge::max && divisor != 1) merged = merged / divisors;
        if (scale != 1) merged = merged * scales;
        store(out + i, merged);
    }
    for (int64_t i = whole; i < n; ++i) {
        F merged = sources[0][i] * weights[0];
        if (!first) merged = merged_with(out[i], sources[0][i], weights[0], how);
        for (int k = 1; k < K; ++k) merged = merged_with(merged, sources[k][i], weights[k], how);
        out[i] = merge_finished(merged, divisor, scale, divisor == 1 ? how : Merge::mean);
    }
}

template <Merge how, class F>
inline void merge_all(F* to, const int64_t* sources, const double* weights, int64_t count, int64_t offset, int64_t n,
                      F scale, int64_t divisor) {
    constexpr int64_t block = 2048;  // of `to` stays in the first-level cache while more sources are merged in
    constexpr int64_t few = 4;
    for (int64_t at = 0; at < n; at += block) {
        const int64_t m = n - at < block ? n - at : block;
        for (int64_t k = 0; k < count; k += few) {
            const int64_t more = count - k < few ? count - k : few;
            const bool last = k + more == count;
            const F* from[few];
            F w[few];
            for (int64_t j = 0; j < more; ++j) {
                from[j] = reinterpret_cast<const F*>(sources[k + j]) + offset + at;
                w[j] = F(weights[k + j]);
            }
            const auto part = k == 0 ? (more == 1   ? merge_few<how, 1, true, F>
                                        : more == 2 ? merge_few<how, 2, true, F>
                                        : more == 3 ? merge_few<how, 3, true, F>
                                                    : merge_few<how, 4, true, F>)
                                     : (more == 1   ? merge_few<how, 1, false, F>
                                        : more == 2 ? merge_few<how, 2, false, F>
                                        : more == 3 ? merge_few<how, 3, false, F>
                                                    : merge_few<how, 4, false, F>);
            part(to + at, from, w, m, last ? divisor : 1, last ? scale : F(1));
        }
    }
}

template <class F>
void merge(void* to, const int64_t* sources, const double* weights, int64_t count, int64_t offset, int64_t n, int how,
           double scale) {
    const auto all = Merge(how) == Merge::max ? merge_all<Merge::max, F> : merge_all<Merge::sum, F>;
    all(static_cast<F*>(to), sources, weights, count, offset, n, F(scale), Merge(how) == Merge::mean ? count : 1);
}

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
