// Merging of K forget Fishers: into a buffer, or where they are read by the dampening. Included by loops.h, after vector.h.
#pragma once

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

// What a dampening reads m from, element by element: `lanes_at` a vector, `at` one, `some` a few, put into `room` if need be.

template <class F>
struct Merged {  // before
    const F* from;
    Vector<F> lanes_at(int64_t i) const { return load(from + i); }
    F at(int64_t i) const { return from[i]; }
    const F* some(int64_t i, int, F*) const { return from + i; }
};

template <Merge how, class F>
struct Merging {  // while it is read; weights and scale of 1 change no bit
    const F* from[sources_in_registers];
    F weights[sources_in_registers];
    Vector<F> spread_weights[sources_in_registers], divisors, scales;
    int64_t count, divisor;
    F scale;

    Merging(const Sources& sources, int64_t offset)
        : divisors(spread(F(sources.count))),
          scales(spread(F(sources.scale))),
          count(sources.count),
          divisor(Merge(sources.how) == Merge::mean ? sources.count : 1),
          scale(F(sources.scale)) {
        for (int64_t k = 0; k < count; ++k) {
            from[k] = reinterpret_cast<const F*>(sources.addresses[k]) + offset;
            weights[k] = F(sources.weights[k]);
            spread_weights[k] = spread(weights[k]);
        }
    }
    FIUN_ALWAYS_INLINE Vector<F> lanes_at(int64_t i) const {
        Vector<F> merged = load(from[0] + i) * spread_weights[0];
        FIUN_KEEP_LOOP
        for (int64_t k = 1; k < count; ++k) merged = merged_lanes<how>(merged, load(from[k] + i) * spread_weights[k]);
        if (how != Merge::max && divisor != 1) merged = merged / divisors;
        return merged * scales;
    }
    F at(int64_t i) const {
        F merged = from[0][i] * weights[0];
        for (int64_t k = 1; k < count; ++k) merged = merged_with(merged, from[k][i], weights[k], how);
        return merge_finished(merged, divisor, scale, divisor == 1 ? how : Merge::mean);
    }
    const F* some(int64_t i, int n, F* room) const {
        for (int j = 0; j < n; ++j) room[j] = at(i + j);
        return room;
    }
};

}  // namespace FIUN_ISA
}  // namespace fiun
