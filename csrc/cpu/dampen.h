// theta *= min(lam I / m, cap) where m > alpha I, and if signed g theta < 0, on one CPU thread: included by loops.h,
// compiled once for each instruction set. What is done to a line of 64 bytes is written once, over the vectors of
// vector.h; the edges of a row, exponents other than 1 and rare pairs of dtypes go by the rules of element.h, which the
// compiler vectorises.
//
// A line costs few instructions only if nothing is reduced on the way: selected and zeroed elements are counted by lane,
// and the largest bit pattern that was met says at the end whether anything was not finite.
#pragma once

namespace fiun {
namespace FIUN_ISA {

constexpr int64_t line_bytes = 64;

// Streams that go side by side, the lines of each that go by before the next has its turn, and how far prefetching is
// ahead. As measured (bench/cpu_kernel.py): more streams, or shorter turns, cost more registers than they fetch memory.
constexpr int side_by_side = 2;
constexpr int64_t turn = 8, ahead = 8;

template <class F>
struct Lane {  // integer as wide as a Fisher's element, so that comparisons add up without repacking
    using type = typename BitsOf<F>::type;
};

// ---- by the rules of element.h: any n, any dtypes -------------------------------------------------------------------

// How many of n elements are above the threshold; counts those that are not finite. `gradient` is for signed ones only.
template <bool with_sign, class F>
inline int64_t select_few(const F* FIUN_RESTRICT original, const F* FIUN_RESTRICT merged,
                          const F* FIUN_RESTRICT gradient, const int n, const Rule<F>& rule, Counts& counts) {
    using Int = typename Lane<F>::type;
    Int selected = 0, finite = 0;
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) {
        selected += Int(is_selected(original[j], merged[j], rule));
        Int all = Int(is_finite(original[j])) & Int(is_finite(merged[j]));
        if constexpr (with_sign) all &= Int(is_finite(gradient[j]));
        finite += all;
    }
    counts.nonfinite += n - finite;
    return selected;
}

struct Few {
    int64_t selected, zeroed;
};

// At most a line, or a vector of Fishers where that is more. Returns how many were selected, and came out as 0.
template <bool with_exponent, bool with_sign, class T, class F>
inline Few dampen_few(T* FIUN_RESTRICT theta, const F* FIUN_RESTRICT original, const F* FIUN_RESTRICT merged,
                      const F* FIUN_RESTRICT gradient, const int n, const Rule<F>& rule, bool write) {
    using Int = typename Lane<F>::type;
    T next[line_bytes / sizeof(uint16_t)];
    Int selected = 0, zeroed = 0;
    FIUN_KEEP_LOOP
    for (int j = 0; j < n; ++j) {
        const T now = theta[j];
        bool chosen = is_selected(original[j], merged[j], rule);
        if constexpr (with_sign) chosen = chosen & is_opposed(gradient[j], now);
        selected += Int(chosen);
        if (with_exponent && !chosen) {  // the power is a call, which costs much more than a branch
            next[j] = now;
            continue;
        }
        const T damped = dampened(now, dampening<with_exponent>(original[j], merged[j], rule));
        next[j] = pick(chosen, damped, now);
        zeroed += Int(chosen) & Int(is_zero(damped));
    }
    if (write) {
        FIUN_KEEP_LOOP
        for (int j = 0; j < n; ++j) theta[j] = next[j];
    }
    return {selected, zeroed};
}

template <bool with_sign, class F, class Source>
inline int64_t count_nonfinite(const F* original, const Source& merged, const F* gradient, int64_t at, int64_t n) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
        int64_t all = int64_t(is_finite(original[j])) & int64_t(is_finite(merged.at(at + j)));
        if constexpr (with_sign) all &= int64_t(is_finite(gradient[at + j]));
        count += 1 - all;
    }
    return count;
}

// ---- by vectors -----------------------------------------------------------------------------------------------------

// The largest number that is rounded to 0: half of the smallest subnormal one, as a tie goes to the even 0.
template <class T>
constexpr float rounds_to_zero = 0;
template <>
constexpr float rounds_to_zero<bf16> = 4.591774807899561e-41f;  // 2^-134
template <>
constexpr float rounds_to_zero<fp16> = 2.98023223876953125e-08f;  // 2^-25

// Numbers that all streams of a call have in common.
template <class T, class F>
struct Common {
    Dampening how;
    Vector<F> cap = spread(F(how.cap)), infinity = spread(F(HUGE_VAL)), zero = spread(F(rounds_to_zero<T>));
    Rule<F> rule(const Node& node) const { return {F(node.alpha), F(node.lam), F(how.exponent), F(how.cap)}; }
};

// What is known of a node, and what was seen, while its lines go by.
template <class F>
struct Running {
    Vector<F> alpha, lam;
    Vector<typename Lane<F>::type> selected{}, zeroed{};
    Bytes largest{};
    Few by_rules{};
    void start(const Node& node) { alpha = spread(F(node.alpha)), lam = spread(F(node.lam)); }
};

// Elements of a line: 64 bytes of theta, and at least a vector of Fishers.
template <class T, class F>
constexpr int line_size = int(line_bytes / sizeof(T)) > lanes<F> ? int(line_bytes / sizeof(T)) : lanes<F>;

// m and, if signed, g begin with the first element of a call; the line is at element `at` of these.
template <bool with_exponent, bool with_sign, class T, class F, class Source>
FIUN_ALWAYS_INLINE void dampen_line(T* theta, const F* original, const Source& merged, const F* gradient, int64_t at,
                                    const Node& node, const Common<T, F>& common, Running<F>& run) {
    constexpr int size = line_size<T, F>, parts = size / lanes<F>;
    Vector<F> i[parts], m[parts];
    decltype(greater(i[0], m[0])) chosen[parts], touched{};
    FIUN_UNROLL
    for (int p = 0; p < parts; ++p) {
        i[p] = load(original + p * lanes<F>);
        m[p] = merged.lanes_at(at + p * lanes<F>);
        chosen[p] = greater(m[p], run.alpha * i[p]);
        touched = either(touched, chosen[p]);
        run.largest = larger_bytes(larger_bytes(run.largest, i[p]), m[p]);
        if constexpr (with_sign) run.largest = larger_bytes(run.largest, positive(load(gradient + at + p * lanes<F>)));
    }
    FIUN_PREFETCH(original + ahead * size);
    if (!any(touched)) return;
    FIUN_PREFETCH(theta + ahead * size);
    if constexpr (with_sign && has_vectors<T, F>) {
        decltype(greater(i[0], m[0])) left{};
        FIUN_UNROLL
        for (int p = 0; p < parts; ++p) {
            const auto admitted = opposed(load(gradient + at + p * lanes<F>), widened(theta + p * lanes<F>));
            chosen[p] = both(chosen[p], admitted);
            left = either(left, chosen[p]);
        }
        if (!any(left)) return;
    }
    if constexpr (with_exponent || !has_vectors<T, F>) {
        F room[size];
        const Few few = dampen_few<with_exponent, with_sign>(theta, original, merged.some(at, size, room),
                                                             with_sign ? gradient + at : nullptr, size,
                                                             common.rule(node), common.how.write);
        run.by_rules.selected += few.selected;
        run.by_rules.zeroed += few.zeroed;
    } else {
        FIUN_UNROLL
        for (int p = 0; p < parts; ++p) run.selected = counted(run.selected, chosen[p]);
        FIUN_UNROLL
        for (int p = 0; p < parts; ++p) {
            T* const t = theta + p * lanes<F>;
            // m = inf is not divided by: exactly 0, without the NaN of inf / inf
            const auto divides = both(chosen[p], greater(common.infinity, m[p]));
            const Vector<F> factor = divide(divides, run.lam * i[p], m[p]);
            const Vector<F> next = widened(t) * lesser(common.cap, factor);
            run.zeroed = counted(run.zeroed, both(chosen[p], at_most(positive(next), common.zero)));
            if (common.how.write) store_where(chosen[p], t, next);
        }
    }
}

// Whole lines of one node; theta is at the start of a line, and m begins with element `at`.
template <class T, class F>
struct Stream {
    T* theta;
    const F* original;
    int64_t at;
    Node* node;
};

// Several streams in turns, so that more memory is on its way at any time. The lines of more than one are whole turns.
template <int count, bool with_exponent, bool with_sign, class T, class F, class Source>
inline void dampen_lines(const Stream<T, F> (&streams)[count], const Source& merged, const F* gradient,
                         const int64_t lines, const Dampening& how) {
    constexpr int64_t size = line_size<T, F>, step = count == 1 ? 1 : turn;
    const Common<T, F> common{how};
    Running<F> runs[count];
    for (int s = 0; s < count; ++s) runs[s].start(*streams[s].node);
    for (int64_t from = 0; from < lines * size; from += step * size) {
        FIUN_UNROLL
        for (int s = 0; s < count; ++s) {
            const Stream<T, F> stream = streams[s];
            FIUN_KEEP_LOOP
            for (int64_t at = from; at < from + step * size; at += size) {
                dampen_line<with_exponent, with_sign>(stream.theta + at, stream.original + at, merged, gradient,
                                                      stream.at + at, *stream.node, common, runs[s]);
            }
        }
    }
    for (int s = 0; s < count; ++s) {
        Counts& counts = streams[s].node->counts;
        counts.selected += total(runs[s].selected) + runs[s].by_rules.selected;
        counts.zeroed += total(runs[s].zeroed) + runs[s].by_rules.zeroed;
        if (beyond_finite<F>(runs[s].largest)) {
            counts.nonfinite +=
                count_nonfinite<with_sign>(streams[s].original, merged, gradient, streams[s].at, lines * size);
        }
    }
}

// n elements of `count` nodes whose parameters lie alike within their lines: several nodes side by side, or a node as
// several stretches; what is left, line by line.
template <bool with_exponent, bool with_sign, class T, class F, class Source>
inline void dampen_alike(Node* nodes, int count, const Source& merged, const F* gradient, int64_t n,
                         const Dampening& how) {
    constexpr int64_t size = line_size<T, F>, worth_it = 64;  // lines of a stretch
    const int64_t to_line = int64_t(-reinterpret_cast<uintptr_t>(nodes[0].theta) % line_bytes) / int64_t(sizeof(T));
    const int64_t head = to_line < n ? to_line : n, lines = (n - head) / size;
    const auto stream = [&](int i, int64_t line) {
        const int64_t at = head + line * size;
        return Stream<T, F>{static_cast<T*>(nodes[i].theta) + at, static_cast<const F*>(nodes[i].original) + at, at,
                            nodes + i};
    };
    const auto edge = [&](Node& node, int64_t from, int64_t to) {
        const Rule<F> rule = Common<T, F>{how}.rule(node);
        T* const theta = static_cast<T*>(node.theta) + from;
        const F* const original = static_cast<const F*>(node.original) + from;
        if (from == to) return;
        F room[size];
        const F* const m = merged.some(from, int(to - from), room);
        const F* const g = with_sign ? gradient + from : nullptr;
        if (select_few<with_sign>(original, m, g, int(to - from), rule, node.counts) == 0) return;
        const Few few = dampen_few<with_exponent, with_sign>(theta, original, m, g, int(to - from), rule, how.write);
        node.counts.selected += few.selected;
        node.counts.zeroed += few.zeroed;
    };
    for (int i = 0; i < count; ++i) edge(nodes[i], 0, head);
    for (int i = 0, step; i < count; i += step) {
        const bool together = count - i >= side_by_side;
        const int64_t each = (together ? lines : lines / side_by_side) / turn * turn;
        int64_t done = 0;  // lines
        step = together ? side_by_side : 1;
        if (!with_exponent && (together || each >= worth_it)) {  // powers take longer than memory
            Stream<T, F> streams[side_by_side];
            for (int s = 0; s < side_by_side; ++s) streams[s] = together ? stream(i + s, 0) : stream(i, s * each);
            dampen_lines<side_by_side, with_exponent, with_sign>(streams, merged, gradient, each, how);
            done = together ? each : side_by_side * each;
        }
        for (int s = 0; s < step && done < lines; ++s) {
            const Stream<T, F> one[] = {stream(i + s, done)};
            dampen_lines<1, with_exponent, with_sign>(one, merged, gradient, lines - done, how);
        }
    }
    for (int i = 0; i < count; ++i) edge(nodes[i], head + lines * size, n);
}

// Those nodes side by side whose parameters lie alike.
template <bool with_exponent, bool with_sign, class T, class F, class Source>
inline void dampen_from(Node* nodes, int count, const Source& merged, const F* gradient, int64_t n,
                        const Dampening& how) {
    const auto offset = [&](int i) { return reinterpret_cast<uintptr_t>(nodes[i].theta) % line_bytes; };
    int same = 1;
    while (same < count && offset(same) == offset(0)) ++same;
    if (same == count) return dampen_alike<with_exponent, with_sign, T, F>(nodes, count, merged, gradient, n, how);
    for (int i = 0; i < count; ++i) dampen_alike<with_exponent, with_sign, T, F>(nodes + i, 1, merged, gradient, n, how);
}

template <class T, class F>
void dampen(Node* nodes, int count, const void* merged, const void* gradient, int64_t n, const Dampening& how) {
    using M = Merged<F>;
    const M source{static_cast<const F*>(merged)};
    const auto plain = how.exponent == 1 ? dampen_from<false, false, T, F, M> : dampen_from<true, false, T, F, M>;
    const auto with_sign = how.exponent == 1 ? dampen_from<false, true, T, F, M> : dampen_from<true, true, T, F, M>;
    (gradient == nullptr ? plain : with_sign)(nodes, count, source, static_cast<const F*>(gradient), n, how);
}

// The same, merging on the way: m never leaves the registers. False, and nothing done, where that is not to be had: GCC 12
// cannot compile it for SSE2 (an internal error).
#if defined(FIUN_AVX512) || defined(FIUN_AVX2) || defined(__aarch64__)
constexpr bool merges_on_the_way = true;
#else
constexpr bool merges_on_the_way = false;
#endif

template <class T, class F>
bool dampen_merging(Node* nodes, int count, const Sources& sources, int64_t offset, int64_t n, const Dampening& how) {
    if constexpr (merges_on_the_way && has_vectors<T, F>) {
        if (how.exponent != 1 || sources.count > sources_in_registers) return false;
        if (Merge(sources.how) == Merge::max) {
            dampen_from<false, false, T, F>(nodes, count, Merging<Merge::max, F>(sources, offset),
                                            static_cast<const F*>(nullptr), n, how);
        } else {
            dampen_from<false, false, T, F>(nodes, count, Merging<Merge::sum, F>(sources, offset),
                                            static_cast<const F*>(nullptr), n, how);
        }
        return true;
    }
    return false;
}

}  // namespace FIUN_ISA
}  // namespace fiun
