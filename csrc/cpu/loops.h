// The innermost loops, compiled once for each instruction set into its own namespace (see element.h). Nothing from the
// standard library is used here: its inline functions would be compiled for that instruction set under a shared name.
// The compiler vectorises: the bodies are free of branches, and the lane counts are constants.
#include "../element.h"
#include "kernels.h"

#if defined(__GNUC__)
#define FIUN_RESTRICT __restrict__
#else
#define FIUN_RESTRICT __restrict
#endif

#include "squares.h"

namespace fiun {
namespace FIUN_ISA {

constexpr int64_t line_bytes = 64;

template <class F>
struct Lane {  // integer as wide as a Fisher's element, so that comparisons add up without repacking
    using type = int32_t;
};
template <>
struct Lane<double> {
    using type = int64_t;
};

#if defined(__GNUC__)
#define FIUN_KEEP_LOOP _Pragma("GCC unroll 1")  // GCC else unrolls loops over a few lanes before it can vectorise them
#define FIUN_PREFETCH_TO_WRITE(address) __builtin_prefetch(address, 1)
#else
#define FIUN_KEEP_LOOP
#define FIUN_PREFETCH_TO_WRITE(address) (void)(address)
#endif

// How many of n elements are selected; counts those that are not finite.
template <class F>
inline int64_t select_line(const F* FIUN_RESTRICT original, const F* FIUN_RESTRICT merged, const int n,
                           const Rule<F>& rule, Counts& counts) {
    using Int = typename Lane<F>::type;
    Int selected = 0, nonfinite = 0;
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) {
        selected += Int(is_selected(original[j], merged[j], rule));
        nonfinite += 1 - (Int(is_finite(original[j])) & Int(is_finite(merged[j])));
    }
    counts.selected += selected;
    counts.nonfinite += nonfinite;
    return selected;
}

// n elements of theta that share a cache line.
template <bool with_exponent, class T, class F>
inline void dampen_line(T* FIUN_RESTRICT theta, const F* FIUN_RESTRICT original, const F* FIUN_RESTRICT merged,
                        const int n, const Rule<F>& rule, bool write, Counts& counts) {
    using Int = typename Lane<F>::type;
    T next[line_bytes / sizeof(T)];
    Int zeroed = 0;
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) {
        const bool chosen = is_selected(original[j], merged[j], rule);
        const T now = theta[j];
        if (with_exponent && !chosen) {  // the power is a call and much dearer than a branch
            next[j] = now;
            continue;
        }
        const T damped = dampened(now, dampening<with_exponent>(original[j], merged[j], rule));
        next[j] = pick(chosen, damped, now);
        zeroed += Int(chosen) & Int(is_zero(damped));
    }
    counts.zeroed += zeroed;
    if (!write) return;
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) theta[j] = next[j];
}

template <bool with_exponent, class T, class F>
inline void dampen_few(T* theta, const F* original, const F* merged, int64_t n, const Rule<F>& rule, bool write,
                       Counts& counts) {
    if (select_line(original, merged, int(n), rule, counts) > 0) {
        dampen_line<with_exponent>(theta, original, merged, int(n), rule, write, counts);
    }
}

// Theta is neither read nor written on lines where nothing is selected. A block of lines is looked through first, without
// branches, so that scattered lines of theta are all on their way from memory before the first of them is needed.
template <bool with_exponent, class T, class F>
inline Counts dampen_all(T* theta, const F* original, const F* merged, int64_t n, const Rule<F>& rule, bool write) {
    constexpr int lanes = int(line_bytes / sizeof(T)), block = 64;
    Counts counts;
    const int64_t to_line = int64_t(-reinterpret_cast<uintptr_t>(theta) % line_bytes) / int64_t(sizeof(T));
    const int64_t head = to_line < n ? to_line : n, whole = head + (n - head) / lanes * lanes;
    if (head > 0) dampen_few<with_exponent>(theta, original, merged, head, rule, write, counts);
    for (int64_t from = head; from < whole; from += block * lanes) {
        const int64_t to = whole - from < block * lanes ? whole : from + block * lanes;
        int64_t touched[block + 1];
        int64_t count = 0;
        for (int64_t i = from; i < to; i += lanes) {
            const bool any = select_line(original + i, merged + i, lanes, rule, counts) != 0;
            touched[count] = i;
            count += any;
            FIUN_PREFETCH_TO_WRITE(any ? static_cast<const void*>(theta + i) : touched);
        }
        for (int64_t c = 0; c < count; ++c) {
            const int64_t i = touched[c];
            dampen_line<with_exponent>(theta + i, original + i, merged + i, lanes, rule, write, counts);
        }
    }
    if (whole < n) {
        dampen_few<with_exponent>(theta + whole, original + whole, merged + whole, n - whole, rule, write, counts);
    }
    return counts;
}

template <class T, class F>
Counts dampen(void* theta, const void* original, const void* merged, int64_t n, const Dampening& how) {
    const Rule<F> rule{F(how.alpha), F(how.lam), F(how.exponent), F(how.cap)};
    const auto all = how.exponent == 1 ? dampen_all<false, T, F> : dampen_all<true, T, F>;
    return all(static_cast<T*>(theta), static_cast<const F*>(original), static_cast<const F*>(merged), n, rule,
               how.write);
}

template <class F>
void merge(void* to, const int64_t* sources, const double* weights, int64_t count, int64_t offset, int64_t n, int how,
           double scale) {
    constexpr int64_t block = 2048;  // of `out` stays in the first-level cache while source after source is merged in
    const Merge kind = Merge(how);
    for (int64_t at = 0; at < n; at += block) {
        const int64_t m = n - at < block ? n - at : block;
        F* FIUN_RESTRICT out = static_cast<F*>(to) + at;
        for (int64_t k = 0; k < count; ++k) {
            const F* FIUN_RESTRICT forget = reinterpret_cast<const F*>(sources[k]) + offset + at;
            const F weight = F(weights[k]);
            if (k == 0) {
                for (int64_t i = 0; i < m; ++i) out[i] = forget[i] * weight;
            } else if (kind == Merge::max) {
                for (int64_t i = 0; i < m; ++i) out[i] = merged_with(out[i], forget[i], weight, Merge::max);
            } else {
                for (int64_t i = 0; i < m; ++i) out[i] = merged_with(out[i], forget[i], weight, Merge::sum);
            }
        }
        if (scale == 1 && kind != Merge::mean) continue;
        for (int64_t i = 0; i < m; ++i) out[i] = merge_finished(out[i], count, F(scale), kind);
    }
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
    {add_squares<float>, add_squares<double>},
    outer_square,
    tile_rows,
    tile_columns,
};

}  // namespace FIUN_ISA
}  // namespace fiun
