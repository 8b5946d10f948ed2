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

#include "vector.h"
#include "dampen.h"
#include "squares.h"

namespace fiun {
namespace FIUN_ISA {

template <Merge how, class F>
inline void merge_in(F* FIUN_RESTRICT merged, const F* FIUN_RESTRICT forget, F weight, const int n) {
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) merged[j] = merged_with(merged[j], forget[j], weight, how);
}

// n elements that share a cache line: out = what was merged so far (or nothing, if first), merged with K more sources.
template <Merge how, int K, bool first, class F>
inline void merge_line(F* FIUN_RESTRICT out, const F* const* sources, const F* weights, int64_t at, const int n) {
    F merged[line_bytes / sizeof(F)];
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) {
        const F term = sources[0][at + j];
        merged[j] = first ? term * weights[0] : merged_with(out[at + j], term, weights[0], how);
    }
    if (K > 1) merge_in<how>(merged, sources[K > 1 ? 1 : 0] + at, weights[K > 1 ? 1 : 0], n);
    if (K > 2) merge_in<how>(merged, sources[K > 2 ? 2 : 0] + at, weights[K > 2 ? 2 : 0], n);
    if (K > 3) merge_in<how>(merged, sources[K > 3 ? 3 : 0] + at, weights[K > 3 ? 3 : 0], n);
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) out[at + j] = merged[j];
}

// All K streams are read side by side: more of memory is on its way at any time than with one after the other.
template <Merge how, int K, bool first, class F>
inline void merge_few(F* out, const F* const* sources, const F* weights, int64_t n) {
    constexpr int lanes = int(line_bytes / sizeof(F));
    const int64_t whole = n / lanes * lanes;
    for (int64_t i = 0; i < whole; i += lanes) merge_line<how, K, first>(out, sources, weights, i, lanes);
    if (whole < n) merge_line<how, K, first>(out, sources, weights, whole, int(n - whole));
}

template <Merge how, class F>
inline void merge_all(F* to, const int64_t* sources, const double* weights, int64_t count, int64_t offset, int64_t n,
                      F scale, Merge kind) {
    constexpr int64_t block = 2048;  // of `to` stays in the first-level cache while more sources are merged in
    constexpr int64_t few = 4;
    for (int64_t at = 0; at < n; at += block) {
        const int64_t m = n - at < block ? n - at : block;
        F* const out = to + at;
        for (int64_t k = 0; k < count; k += few) {
            const int64_t more = count - k < few ? count - k : few;
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
            part(out, from, w, m);
        }
        if (scale == 1 && kind != Merge::mean) continue;
        for (int64_t i = 0; i < m; ++i) out[i] = merge_finished(out[i], count, scale, kind);
    }
}

template <class F>
void merge(void* to, const int64_t* sources, const double* weights, int64_t count, int64_t offset, int64_t n, int how,
           double scale) {
    const auto all = Merge(how) == Merge::max ? merge_all<Merge::max, F> : merge_all<Merge::sum, F>;
    all(static_cast<F*>(to), sources, weights, count, offset, n, F(scale), Merge(how));
}

template <bool square, bool zero, class T, class F>
inline void accumulate_all(F* FIUN_RESTRICT into, T* FIUN_RESTRICT gradient, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
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
    {add_squares<float>, add_squares<double>},
    outer_square,
    tile_rows,
    tile_columns,
};

}  // namespace FIUN_ISA
}  // namespace fiun
