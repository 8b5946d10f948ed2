// The C++ of the cpu backend against a scalar loop of the element rules, bit for bit, in blocks of memory that end where
// the data end: made to run under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (sanitize.sh).
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <vector>

#include "../../csrc/cpu/pool.h"
#include "../../csrc/cpu/run.h"
#include "../../csrc/element.h"

using namespace fiun;
using common::bf16;
using common::fp16;

namespace {

std::mt19937_64 generator(1);

int64_t below(int64_t n) { return int64_t(generator() % uint64_t(n)); }

// Around the cpu backend's lines (64 bytes), blocks and tiles (32768 elements).
const int64_t lengths[] = {0,  1,  2,   7,   15,   16,   17,    31,    33,
                           63, 64, 65,  255, 1009, 4097, 16385, 32769, 70001};

int64_t some_length() { return lengths[below(int64_t(std::size(lengths)))]; }

template <class F>
F fisher_value() {
    static const double edges[] = {0, 1e-45, 1e-40, 1e-30, 0.25, 0.5, 1, 2, 1e30, 3e38, INFINITY, NAN};
    return below(4) == 0 ? F(edges[below(12)]) : F(double(below(1 << 20)) / (1 << 18));
}

// `shift` elements before the data, so that they are not aligned to a line; nothing after them.
template <class T>
struct Block {
    std::vector<T> all;
    int64_t shift;
    Block(int64_t n, int64_t shift) : all(size_t(n + shift)), shift(shift) { all.shrink_to_fit(); }
    T* data() { return all.data() + shift; }
    int64_t address() { return reinterpret_cast<int64_t>(data()); }
    bool same(const Block& other) const {
        return all.size() == other.all.size() &&
               (all.empty() || std::memcmp(all.data(), other.all.data(), all.size() * sizeof(T)) == 0);
    }
};

template <class T>
void fill_bits(Block<T>& block) {  // any bits at all: NaN, infinities and subnormals among them
    for (T& value : block.all) {
        const uint64_t bits = generator();
        std::memcpy(&value, &bits, sizeof(T));
        if (common::widen(value) != common::widen(value)) value = T{};  // which NaN comes out is not part of the contract
    }
}

void expect(bool right, const char* what, const Kernels& kernels) {
    if (right) return;
    std::fprintf(stderr, "%s differs from the scalar loop (%s)\n", what, kernels.isa);
    std::exit(1);
}

template <class T>
constexpr int kind_of();
template <>
constexpr int kind_of<float>() {
    return f32;
}
template <>
constexpr int kind_of<double>() {
    return f64;
}
template <>
constexpr int kind_of<bf16>() {
    return bf16_kind;
}
template <>
constexpr int kind_of<fp16>() {
    return fp16_kind;
}

template <class F>
F merged_element(std::vector<Block<F>>& forgets, const double* weights, int64_t i, common::Merge how, double scale) {
    F merged = forgets[0].data()[i] * F(weights[0]);
    for (size_t k = 1; k < forgets.size(); ++k) {
        merged = common::merged_with(merged, forgets[k].data()[i], F(weights[k]), how);
    }
    return common::merge_finished(merged, int64_t(forgets.size()), F(scale), how);
}

template <class T, class F>
void check_dampen(const Kernels& kernels, int threads, bool write) {
    const int64_t row_count = 1 + below(4), nodes = 1 + below(5);
    const double exponent = below(3) == 0 ? 0.5 : 1.0, scale = below(2) ? 1.0 : 0.75, cap = 1.0;
    const auto how = common::Merge(below(3));
    const bool with_sign = below(2);
    std::vector<double> alpha, lam, weights;
    for (int64_t n = 0; n < nodes; ++n) {
        alpha.push_back(double(below(8)) / 4);
        lam.push_back(double(below(8)) / 4);
    }
    std::vector<int64_t> rows, sources, beside, targets, counts(size_t(3 * nodes), 5), expected = counts;
    std::vector<std::vector<Block<F>>> forgets(static_cast<size_t>(row_count)), gradients = forgets, originals = forgets;
    std::vector<std::vector<Block<T>>> thetas(static_cast<size_t>(row_count));
    for (int64_t r = 0; r < row_count; ++r) {
        const int64_t length = some_length(), k_count = 1 + below(3);
        for (int64_t v : {length, int64_t(sources.size()), k_count, int64_t(targets.size() / 3), nodes}) rows.push_back(v);
        for (int64_t k = 0; k < k_count; ++k) {
            forgets[r].emplace_back(length, below(4));
            for (F& value : forgets[r].back().all) value = fisher_value<F>();
            weights.push_back(below(2) ? 1.0 : 0.5);
            sources.push_back(forgets[r].back().address());
            gradients[r].emplace_back(length, below(4));
            fill_bits(gradients[r].back());
            beside.push_back(gradients[r].back().address());
        }
        for (int64_t n = 0; n < nodes; ++n) {
            originals[r].emplace_back(length, below(4));
            for (F& value : originals[r].back().all) value = fisher_value<F>();
            thetas[r].emplace_back(length, below(40));
            fill_bits(thetas[r].back());
            for (int64_t v : {thetas[r].back().address(), originals[r].back().address(), n}) targets.push_back(v);
        }
    }
    const auto forgets_before = forgets, gradients_before = gradients, originals_before = originals;
    auto wanted = thetas;
    for (int64_t r = 0; r < row_count; ++r) {
        for (int64_t n = 0; n < nodes; ++n) {
            const common::Rule<F> rule{F(alpha[n]), F(lam[n]), F(exponent), F(cap)};
            for (int64_t i = 0; i < rows[5 * r]; ++i) {
                const F m = merged_element(forgets[r], &weights[rows[5 * r + 1]], i, how, scale);
                const F original = originals[r][n].data()[i];
                T& theta = wanted[r][n].data()[i];
                const F slope = merged_element(gradients[r], &weights[rows[5 * r + 1]], i, common::Merge::sum, 1);
                expected[3 * n + 2] += !(common::is_finite(m) && common::is_finite(original) &&
                                         (!with_sign || common::is_finite(slope)));
                if (!common::is_selected(original, m, rule)) continue;
                if (with_sign && !common::is_opposed(slope, theta)) continue;
                const F factor = exponent == 1 ? common::dampening<false>(original, m, rule)
                                               : common::dampening<true>(original, m, rule);
                const T damped = common::dampened(theta, factor);
                expected[3 * n] += 1;
                expected[3 * n + 1] += common::is_zero(damped);
                if (write) theta = damped;
            }
        }
    }
    const Table table{rows.data(),    row_count,      sources.data(), with_sign ? beside.data() : nullptr,
                      weights.data(), targets.data(), kind_of<F>()};
    const Limits limits{kind_of<T>(), alpha.data(), lam.data(), exponent, cap};
    DampenLaunch(table, Merging{int(how), scale}, limits, threads).run(kernels, counts.data(), write);
    expect(counts == expected, "counts", kernels);
    for (int64_t r = 0; r < row_count; ++r) {
        for (int64_t n = 0; n < nodes; ++n) {
            for (size_t i = 0; i < wanted[r][n].all.size(); ++i) {
                T &a = wanted[r][n].all[i], &b = thetas[r][n].all[i];
                const bool both_nan = common::widen(a) != common::widen(a) && common::widen(b) != common::widen(b);
                expect(both_nan || std::memcmp(&a, &b, sizeof(T)) == 0, "dampen", kernels);
            }
            expect(originals[r][n].same(originals_before[r][n]), "an original Fisher", kernels);
        }
        for (size_t k = 0; k < forgets[r].size(); ++k) {
            expect(forgets[r][k].same(forgets_before[r][k]), "a forget Fisher", kernels);
            expect(gradients[r][k].same(gradients_before[r][k]), "a gradient", kernels);
        }
    }
}

template <class F>
void check_merge(const Kernels& kernels, int threads) {
    const int64_t length = below(3) ? some_length() : 200000, count = 1 + below(5);
    const double scale = below(2) ? 1.0 : 0.3;
    const auto how = common::Merge(below(3));
    std::vector<Block<F>> forgets;
    std::vector<int64_t> sources;
    std::vector<double> weights;
    for (int64_t k = 0; k < count; ++k) {
        forgets.emplace_back(length, below(4));
        for (F& value : forgets.back().all) value = fisher_value<F>();
        sources.push_back(forgets.back().address());
        weights.push_back(below(2) ? 1.0 : 0.1);
    }
    Block<F> out(length, below(4));
    run_merge(kernels, kind_of<F>(), sources.data(), weights.data(), count, int(how), scale, out.address(), length,
              threads);
    for (int64_t i = 0; i < length; ++i) {
        const F wanted = merged_element(forgets, weights.data(), i, how, scale), found = out.data()[i];
        expect(found == wanted || (found != found && wanted != wanted), "merge", kernels);
    }
}

template <class T, class F>
void check_accumulate(const Kernels& kernels, int threads) {
    const bool square = below(2), zero = below(2);
    const int64_t count = 1 + below(70);
    std::vector<Block<T>> gradients;
    std::vector<Block<F>> into;
    std::vector<int64_t> pairs;
    for (int64_t p = 0; p < count; ++p) {
        const int64_t length = below(8) ? below(70) : some_length();
        gradients.emplace_back(length, below(4));
        fill_bits(gradients.back());
        into.emplace_back(length, below(4));
        for (F& value : into.back().all) value = F(double(below(1000)));
        for (int64_t v : {gradients.back().address(), into.back().address(), length, int64_t(kind_of<T>()),
                          int64_t(kind_of<F>())}) {
            pairs.push_back(v);
        }
    }
    auto wanted = into;
    for (int64_t p = 0; p < count; ++p) {
        for (int64_t i = 0; i < pairs[5 * p + 2]; ++i) {
            F& total = wanted[p].data()[i];
            total = common::accumulated(total, F(common::widen(gradients[p].data()[i])), square);
        }
    }
    const auto before = gradients;
    run_accumulate(kernels, pairs.data(), count, square, zero, threads);
    for (int64_t p = 0; p < count; ++p) {
        expect(into[p].same(wanted[p]), "accumulate", kernels);
        if (!zero) expect(gradients[p].same(before[p]), "a gradient", kernels);
        for (int64_t i = 0; zero && i < pairs[5 * p + 2]; ++i) {
            expect(common::is_zero(gradients[p].data()[i]), "a zeroed gradient", kernels);
        }
    }
}

template <class T, class F>
void check_histogram(const Kernels& kernels, int threads) {
    using Int = typename common::BitsOf<F>::type;
    const int64_t nodes = 1 + below(4), length = below(3) ? some_length() : 200000, count = 1 + below(3);
    const int low = sizeof(F) == 4 ? 20 : 52;
    const bool nearest = below(2);
    const bool with_sign = below(2);
    const double scale = below(2) ? 1.0 : 0.3;
    std::vector<Block<F>> forgets, gradients, originals;
    std::vector<Block<T>> thetas;
    std::vector<int64_t> sources, beside, targets, bases, rows{length, 0, count, 0, nodes};
    std::vector<double> weights;
    for (int64_t k = 0; k < count; ++k) {
        forgets.emplace_back(length, below(4));
        for (F& value : forgets.back().all) value = fisher_value<F>();
        sources.push_back(forgets.back().address());
        gradients.emplace_back(length, below(4));
        fill_bits(gradients.back());
        beside.push_back(gradients.back().address());
        weights.push_back(below(2) ? 1.0 : 0.1);
    }
    for (int64_t n = 0; n < nodes; ++n) {
        thetas.emplace_back(length, below(40));
        fill_bits(thetas.back());
        originals.emplace_back(length, below(4));
        for (F& value : originals.back().all) value = fisher_value<F>();
        bases.push_back(below(2) ? 0 : below(1500));
        const int64_t theta = with_sign ? thetas.back().address() : 0;
        for (int64_t v : {theta, originals.back().address(), n}) targets.push_back(v);
    }
    std::vector<int64_t> counts(size_t(nodes * common::histogram_bins), 5), expected = counts;
    for (int64_t n = 0; n < nodes; ++n) {
        for (int64_t i = 0; i < length; ++i) {
            const F m = merged_element(forgets, weights.data(), i, common::Merge::max, scale);
            const F ratio = m / originals[n].data()[i];
            if (!(ratio >= 0)) continue;
            const F slope = merged_element(gradients, weights.data(), i, common::Merge::sum, 1);
            if (with_sign && !common::is_opposed(slope, thetas[n].data()[i])) continue;
            int64_t bin = int64_t(common::bit_cast<Int>(common::absolute(ratio)) >> low) - bases[n];
            if (nearest) bin = bin < 0 ? 0 : bin < common::histogram_bins ? bin : common::histogram_bins - 1;
            if (bin >= 0 && bin < common::histogram_bins) ++expected[size_t(n * common::histogram_bins + bin)];
        }
    }
    const Table table{rows.data(),    1,              sources.data(), with_sign ? beside.data() : nullptr,
                      weights.data(), targets.data(), kind_of<F>()};
    run_histogram(kernels, table, Merging{int(common::Merge::max), scale}, kind_of<T>(), bases.data(), low, nearest,
                  counts.data(), threads);
    expect(counts == expected, "histogram", kernels);
}

// Sums of squared products against a plain loop; they may differ by rounding.
void check_outer_square(const Kernels& kernels, int threads) {
    const int64_t samples = below(4), positions = 1 + below(20), m = 1 + below(40), k = 1 + below(120), gap = below(3);
    Block<float> left(samples * positions * (m + gap), 0), right(samples * positions * (k + gap), 0), into(m * k, below(4));
    for (Block<float>* block : {&left, &right, &into}) {
        for (float& value : block->all) value = float(below(2001) - 1000) / 1000;
    }
    auto wanted = into;
    std::vector<float> products;
    for (int64_t b = 0; b < samples; ++b) {
        for (int64_t i = 0; i < m * k; ++i) {
            double sum = 0;
            for (int64_t t = 0; t < positions; ++t) {
                const int64_t row = b * positions + t;
                sum += double(left.data()[row * (m + gap) + i / k]) * right.data()[row * (k + gap) + i % k];
            }
            products.push_back(float(sum));
            wanted.data()[i] += float(sum * sum);
        }
    }
    auto squares = into;
    const OuterSquare work{left.data(), right.data(), into.data(), samples, positions, m, k, positions * (m + gap), m + gap,
                           positions * (k + gap), k + gap};
    run_outer_square(kernels, work, threads);
    run_add_squares(kernels, f32, squares.address(), reinterpret_cast<int64_t>(products.data()), samples, m * k, threads);
    for (int64_t i = 0; i < m * k; ++i) {
        const float right_value = wanted.data()[i], bound = 1e-4f * (1 + fabsf(right_value));
        expect(fabsf(into.data()[i] - right_value) <= bound, "outer_square", kernels);
        expect(fabsf(squares.data()[i] - right_value) <= bound, "add_squares", kernels);
    }
}

// Stretches follow one another and differ by one at most; every number is handed out once, whoever asks.
void check_sharing() {
    const Kernels& any = *usable_kernels().front();
    for (int threads = 1; threads <= 7; ++threads) {
        for (int64_t count : {0, 1, 2, 5, 6, 7, 8, 100, 1001}) {
            expect(stretch_start(count, threads, 0) == 0 && stretch_start(count, threads, threads) == count, "ends", any);
            for (int t = 0; t < threads; ++t) {
                const int64_t size = stretch_start(count, threads, t + 1) - stretch_start(count, threads, t);
                expect(size == count / threads || size == count / threads + 1, "a stretch", any);
            }
            std::vector<std::atomic<int>> taken(static_cast<size_t>(count));
            auto body = [&](int64_t i, int) { ++taken[size_t(i)]; };
            share_out(count, threads, body);
            for (auto& times : taken) expect(times == 1, "a share", any);
        }
    }
}

template <class T, class F>
void check(const Kernels& kernels, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        const int threads = int(1 + below(4));
        check_dampen<T, F>(kernels, threads, below(4) != 0);
        check_accumulate<T, F>(kernels, threads);
        if (kind_of<T>() == f32 && kind_of<F>() == f32) check_outer_square(kernels, threads);
        if (kind_of<T>() == kind_of<F>()) check_merge<F>(kernels, threads);
        check_histogram<T, F>(kernels, threads);
    }
}

// Every half-precision number survives; every rounding is the nearest, ties to even.
template <class T>
void check_conversions(const Kernels& kernels) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const T half{uint16_t(bits)};
        const float wide = common::widen(half);
        T back;
        common::narrow(wide, back);
        expect(wide != wide ? common::widen(back) != common::widen(back) : back.bits == half.bits, "conversion", kernels);
        const T next{uint16_t(bits + 1)};
        const float above = common::widen(next);
        if (!(wide - wide == 0 && above - above == 0) || (bits & 0x7fff) == 0x7fff) continue;
        common::narrow(float((double(wide) + double(above)) / 2), back);  // halfway: to the even one
        expect(back.bits == (bits & 1 ? next.bits : half.bits), "rounding of a tie", kernels);
        common::narrow(float(double(wide) * 0.75 + double(above) * 0.25), back);
        expect(back.bits == half.bits, "rounding", kernels);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
    for (const Kernels* kernels : usable_kernels()) {
        check<float, float>(*kernels, rounds);
        check<float, double>(*kernels, rounds);
        check<double, float>(*kernels, rounds);
        check<double, double>(*kernels, rounds);
        check<bf16, float>(*kernels, rounds);
        check<bf16, double>(*kernels, rounds);
        check<fp16, float>(*kernels, rounds);
        check<fp16, double>(*kernels, rounds);
        std::printf("  %s: as the scalar loop\n", kernels->isa);
    }
    check_sharing();
    check_conversions<bf16>(*usable_kernels().front());
    check_conversions<fp16>(*usable_kernels().front());
    return 0;
}
