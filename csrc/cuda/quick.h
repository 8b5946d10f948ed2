// What the dampening kernel does with ordinary float32 numbers: the bits of element.h in fewer instructions.
//
// A division is the one of div.rn.f32 on its fast path: a reciprocal, a step of Newton's, the quotient, and one
// correction by its exact remainder. The compiler asks of each quotient whether that is exact; here a lane asks once of
// all its numbers, and its warp takes the other path where one is not in these ranges. They keep the remainder, 46 bits
// below the dividend, and the quotient away from the subnormal numbers, and the quotient from overflow.
#pragma once

#include "lanes.h"

namespace fiun {
namespace FIUN_ISA {

constexpr uint32_t bits_of_power(int exponent) { return uint32_t(127 + exponent) << 23; }
constexpr uint32_t least_divisor = bits_of_power(-96), least_original = bits_of_power(-92);  // or 0
constexpr float most_sum = 16777216, least_lambda = 0.015625f, most_lambda = 64;  // so that dividends reach from 2^-98 to 2^30

// -1 / x, at most one unit in the last place off, as the PTX manual promises.
FIUN_DEVICE float nearly_reciprocal(float x) {
#ifdef __CUDA_ARCH__
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(-x));
    return near;
#else  // the shim's is off by as much as it may be, up or down
    const uint32_t bits = bit_cast<uint32_t>(-1 / x);
    return bit_cast<float>(bits + uint32_t(int((bit_cast<uint32_t>(x) * 2654435761u >> 16) % 3) - 1));
#endif
}

// -1 / y to half a unit in the last place or hardly more. With a negative reciprocal no step needs a sign of its own.
FIUN_DEVICE Two reciprocals(Two y) {
    const Two r{nearly_reciprocal(y.a), nearly_reciprocal(y.b)};
    return fused(r, fused(y, r, {1, 1}), r);
}

// -x / y, `r` being reciprocals(y).
FIUN_DEVICE Two quick_quotient(Two x, Two y, Two r) {
    const Two q = times(x, r);
    return fused(r, fused(y, q, x), q);
}

template <class F>
constexpr bool has_quick = sizeof(F) == 4;

// Whether each number is 0 or at least `smallest`.
template <int n, class F>
FIUN_DEVICE bool all_are_from(uint32_t smallest, const F* numbers) {
    if constexpr (!has_quick<F>) return false;
    uint32_t least = ~0u;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(float(numbers[i])) - 1;  // 0 becomes the largest
        least = bits < least ? bits : least;
    }
    return least >= smallest - 1;
}

// Both only where the sum is at most most_sum. A divisor of 0 is never selected.
template <int n, class F>
FIUN_DEVICE bool all_are_divisors(const F* merged) {
    return all_are_from<n>(least_divisor, merged);
}
template <int n, class F>
FIUN_DEVICE bool all_are_dividends(const F* original, const Rule<F>& rule) {
    return all_are_from<n>(least_original, original) & (rule.lam >= F(least_lambda)) & (rule.lam <= F(most_lambda)) &
           (rule.alpha <= F(3.402823466e38f));  // with an infinite alpha, which leaves a node alone, alpha I may be NaN
}

// What a lane sees of one node before anything is counted.
template <int n, class F>
struct Look {
    bool above = false;   // something is selected
    bool finite = true;   // and the sum small enough for quick.h
    F difference[n] = {};  // alpha I - m, where quick.h may be wanted
};

// Whether all of these are finite; false as well where their sum is beyond what quotients want.
template <int n, class F>
FIUN_DEVICE bool all_finite(const F* numbers) {
    F sum = 0;
    if constexpr (has_quick<F>) {
        Two sums = two_of(numbers);
#pragma unroll
        for (int i = 2; i < n; i += 2) sums = plus(sums, two_of(numbers + i));
        sum = F(sums.a + sums.b);
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) sum += numbers[i];
    }
    return absolute(sum) <= F(most_sum);
}

// Of ordinary numbers the sign of the difference is the comparison; where one is not finite, `finite` is what counts.
template <int n, class F>
FIUN_DEVICE Look<n, F> looked_at(const F* original, const F* merged, const Rule<F>& rule) {
    Look<n, F> look;
    look.finite = all_finite<n>(original);
    uint32_t signs = 0;
#pragma unroll
    for (int i = 0; i < n; i += 2) {
        if constexpr (has_quick<F>) {
            // With 0 added a product of -0 is 0, so that no difference is -0. And ptxas 13.0 cannot contract it with the
            // difference, as it does with a product of two and a difference of two in spite of their .rn.
            const Two alpha{float(rule.alpha), float(rule.alpha)};
            const Two difference = minus(fused(alpha, two_of(original + i), {0, 0}), two_of(merged + i));
            look.difference[i] = F(difference.a), look.difference[i + 1] = F(difference.b);
            signs |= bit_cast<uint32_t>(difference.a) | bit_cast<uint32_t>(difference.b);
        } else {
            for (int j = i; j < i + 2; ++j) look.above |= is_selected(original[j], merged[j], rule);
        }
    }
    if constexpr (has_quick<F>) look.above = int(signs) < 0;
    return look;
}

// One bit per element, the first one lowest.
template <int n, class F>
FIUN_DEVICE unsigned selected_bits(const Look<n, F>& look) {
    unsigned chosen = 0;
#pragma unroll
    for (int i = n - 1; i >= 0; --i) chosen = chosen << 1 | bit_cast<uint32_t>(float(look.difference[i])) >> 31;
    return chosen;
}

// ---- two halves in a word ------------------------------------------------------------------------------------------

FIUN_DEVICE float low_half(uint32_t word, bf16) { return bit_cast<float>(word << 16); }
FIUN_DEVICE float high_half(uint32_t word, bf16) { return bit_cast<float>(word & 0xffff0000u); }

FIUN_DEVICE float low_half(uint32_t word, fp16) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(wide) : "r"(word));
    return wide;
#else
    return widen(fp16{uint16_t(word)});
#endif
}
FIUN_DEVICE float high_half(uint32_t word, fp16) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(wide) : "r"(word));
    return wide;
#else
    return widen(fp16{uint16_t(word >> 16)});
#endif
}

// Rounded to the nearest, ties to even.
FIUN_DEVICE uint32_t two_halves(float low, float high, bf16) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    bf16 a, b;
    narrow(low, a), narrow(high, b);
    return uint32_t(b.bits) << 16 | a.bits;
#endif
}
FIUN_DEVICE uint32_t two_halves(float low, float high, fp16) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    fp16 a, b;
    narrow(low, a), narrow(high, b);
    return uint32_t(b.bits) << 16 | a.bits;
#endif
}

// Four bits as the highest bits of four bytes.
FIUN_DEVICE uint32_t at_bytes(unsigned four) { return (four & 0xfu) * 0x10204080u & 0x80808080u; }

// All ones in each half whose bit is set; `which`: the first or the second two of the four.
template <int which>
FIUN_DEVICE uint32_t half_mask(uint32_t bytes) {
#ifdef __CUDA_ARCH__
    uint32_t mask;  // 8 + n: the sign of byte n, eight times
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(mask) : "r"(bytes), "n"(which == 0 ? 0x9988 : 0xbbaa));
    return mask;
#else
    const uint32_t pair = bytes >> (16 * which);
    return (pair & 0x80u ? 0xffffu : 0u) | (pair & 0x8000u ? 0xffff0000u : 0u);
#endif
}

// ---- dampening -----------------------------------------------------------------------------------------------------

// One unit of halves, two in a word: values where `chosen` has a bit become values * factor. Returns how many became 0.
template <class T, int unit>
FIUN_DEVICE int scale_halves(uint32_t (&words)[unit / 2], const float (&factors)[unit], unsigned chosen) {
    uint32_t left[unit / 2], all = ~0u;  // the highest bit of each half that did not become 0
#pragma unroll
    for (int w = 0; w < unit / 2; ++w) {
        const uint32_t bytes = at_bytes(chosen >> (w / 2 * 4));
        const uint32_t mask = w % 2 ? half_mask<1>(bytes) : half_mask<0>(bytes);
        const Two damped = times({low_half(words[w], T{}), high_half(words[w], T{})}, two_of(factors + 2 * w));
        const uint32_t halves = two_halves(damped.a, damped.b, T{});
        // 0x7fff + what is left of a half without its sign has the highest bit, unless that is 0
        left[w] = ((halves | ~mask) & 0x7fff7fffu) + 0x7fff7fffu;
        all &= left[w];
        words[w] = (halves & mask) | (words[w] & ~mask);
    }
    int zeroed = 0;
    if ((~all & 0x80008000u) != 0) {
#pragma unroll
        for (int w = 0; w < unit / 2; ++w) zeroed += __popc(~left[w] & 0x80008000u);
    }
    return zeroed;
}

// As dampen_units in dampen.h, where the lane's numbers are in the ranges above. `inverse`: reciprocals of `merged`. `values`: as from load_theta.
template <int unit, int units, int count, class V, class T, class F>
FIUN_DEVICE int dampen_units_quickly(T* theta, V (&values)[units][count], const F (&original)[units][unit],
                                     const F (&merged)[units][unit], const float (&inverse)[units][unit],
                                     const Rule<F>& rule, unsigned chosen, bool write) {
    constexpr unsigned whole = (1u << unit) - 1;
    int zeroed = 0;
#pragma unroll
    for (int u = 0; u < units; ++u) {
        const unsigned here = chosen >> (u * unit) & whole;
        if (!here) continue;
        float factors[unit];
        const float lam = -float(rule.lam);
        if constexpr (unit % 2 == 0) {
#pragma unroll
            for (int i = 0; i < unit; i += 2) {
                const Two x = times({lam, lam}, two_of(original[u] + i));
                const Two q = quick_quotient(x, two_of(merged[u] + i), two_of(inverse[u] + i));
                factors[i] = fminf(q.a, float(rule.cap)), factors[i + 1] = fminf(q.b, float(rule.cap));
            }
        } else {
            const Two x{lam * float(original[u][0]), 0}, y{float(merged[u][0]), 1}, r{inverse[u][0], -1};
            factors[0] = fminf(quick_quotient(x, y, r).a, float(rule.cap));
        }
        if constexpr (sizeof(V) == 4 && sizeof(T) == 2) {
            zeroed += scale_halves<T, unit>(values[u], factors, here);
        } else {
#pragma unroll
            for (int i = 0; i < unit; ++i) {
                const bool chosen_here = here >> i & 1;
                const T damped = dampened(values[u][i], F(factors[i]));
                zeroed += chosen_here && is_zero(damped);
                values[u][i] = pick(chosen_here, damped, values[u][i]);
            }
        }
        if (write) store(reinterpret_cast<V*>(theta + u * warp_threads * unit), values[u]);
    }
    return zeroed;
}

}  // namespace FIUN_ISA
}  // namespace fiun
