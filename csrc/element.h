// The rules for one element, written once for host and device: accumulate, merge, dampen. docs/semantics.md has the
// formulas, fiun_fast/kernels/reference.py the same in torch. Compile without fast-math and with -ffp-contract=off
// (nvcc: -fmad=false), because the bits of every step are part of the contract.
//
// F is the dtype of the Fishers (float, double), T that of the parameters (float, double, bf16, fp16).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FIUN_HD __host__ __device__ __forceinline__
#else
#define FIUN_HD inline
#endif

// Each instruction set compiles this file into a namespace of its own: two versions of one inline function under one
// name would be merged by the linker, and an old CPU could end up with the new CPU's instructions.
#ifndef FIUN_ISA
#define FIUN_ISA common
#endif

namespace fiun {
namespace FIUN_ISA {

// ---- numbers -------------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

template <class To, class From>
FIUN_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

FIUN_HD float widen(float x) { return x; }
FIUN_HD double widen(double x) { return x; }
FIUN_HD float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FIUN_HD float widen(fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
    // 2^112 moves the exponent from bias 15 to bias 127; it is exact, also for subnormal halves
    const float finite = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(0x77800000));
    const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN
    return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(finite)));
}

// Narrowing rounds to the nearest, ties to even; NaN stays NaN.
FIUN_HD void narrow(float x, float& out) { out = x; }
FIUN_HD void narrow(double x, double& out) { out = x; }
FIUN_HD void narrow(double x, float& out) { out = float(x); }

FIUN_HD void narrow(float x, bf16& out) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = uint16_t(x != x ? (bits >> 16) | 0x40u : rounded);
}

FIUN_HD void narrow(float x, fp16& out) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // normal halves: rebias the exponent and round off 13 bits; a carry moves into the exponent as it should
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // subnormal halves: next to 0.5 one unit in the last place is 2^-24, so that the addition does the rounding
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    const uint32_t subnormal = bit_cast<uint32_t>(shifted) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN; inf and what rounds up to it
    out.bits = uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite));
}

FIUN_HD bool is_zero(float x) { return x == 0; }
FIUN_HD bool is_zero(double x) { return x == 0; }
FIUN_HD bool is_zero(bf16 x) { return (x.bits & 0x7fffu) == 0; }
FIUN_HD bool is_zero(fp16 x) { return (x.bits & 0x7fffu) == 0; }

// yes where chosen, else no, as a select of bits rather than a branch
FIUN_HD float pick(bool chosen, float yes, float no) { return chosen ? yes : no; }
FIUN_HD double pick(bool chosen, double yes, double no) { return chosen ? yes : no; }
FIUN_HD bf16 pick(bool chosen, bf16 yes, bf16 no) { return {uint16_t(chosen ? yes.bits : no.bits)}; }
FIUN_HD fp16 pick(bool chosen, fp16 yes, fp16 no) { return {uint16_t(chosen ? yes.bits : no.bits)}; }

template <class F>
FIUN_HD bool is_finite(F x) {
    return x - x == F(0);
}

FIUN_HD float absolute(float x) { return fabsf(x); }
FIUN_HD double absolute(double x) { return fabs(x); }
FIUN_HD float power(float x, float e) { return powf(x, e); }
FIUN_HD double power(double x, double e) { return pow(x, e); }

// The dtype in which a parameter meets its factor: the wider of the two, or float for half precision.
template <class T, class F>
struct Product {
    using type = float;
};
template <class F>
struct Product<double, F> {
    using type = double;
};
template <>
struct Product<float, double> {
    using type = double;
};

// ---- accumulate: into += |g|^power ---------------------------------------------------------------------------------

template <class F>
FIUN_HD F accumulated(F into, F gradient, bool square) {
    return into + (square ? gradient * gradient : absolute(gradient));
}

// ---- merge: m = scale * reduce_k (w_k F_k). Multiplying by 1 changes nothing, so w = 1 and scale = 1 need no code.

enum class Merge : int { max = 0, mean = 1, sum = 2 };

template <class F>
FIUN_HD F larger(F a, F b) {  // a NaN on either side wins
    return (a > b || a != a) ? a : b;
}

template <class F>
FIUN_HD F merged_with(F so_far, F forget, F weight, Merge how) {
    const F term = forget * weight;
    return how == Merge::max ? larger(so_far, term) : so_far + term;
}

template <class F>
FIUN_HD F merge_finished(F reduced, int64_t sources, F scale, Merge how) {
    return (how == Merge::mean ? reduced / F(sources) : reduced) * scale;
}

// ---- dampen: theta *= min((lam I / m)^exponent, cap) where m > alpha I, if signed only where g * theta < 0 -----------

template <class F>
struct Rule {
    F alpha, lam, exponent, cap;
};

template <class F>
FIUN_HD bool is_selected(F original, F merged, const Rule<F>& rule) {  // false where either is NaN
    return merged > rule.alpha * original;
}

// Whether g * theta < 0: signs differ, and neither is 0 or NaN. Not by the product, which may underflow to 0. In a signed
// dampening only such elements are selected; g = sum over k of w_k g_k, as Merge::sum has it, without a scale.
template <class F, class T>
FIUN_HD bool is_opposed(F gradient, T theta) {
    const auto t = widen(theta);
    return ((gradient < 0) & (t > 0)) | ((gradient > 0) & (t < 0));
}

// For selected elements only: merged is above 0 and not NaN, original is finite.
template <bool with_exponent, class F>
FIUN_HD F dampening(F original, F merged, const Rule<F>& rule) {
    F factor = rule.lam * original / merged;
    if (with_exponent) factor = original == F(0) ? F(0) : power(factor, rule.exponent);
    factor = factor > rule.cap ? rule.cap : factor;
    return is_finite(merged) ? factor : F(0);
}

template <class T, class F>
FIUN_HD T dampened(T theta, F factor) {
    using P = typename Product<T, F>::type;
    T out;
    narrow(P(widen(theta)) * P(factor), out);
    return out;
}

// ---- histogram of m / I: a bin is a range of the ratio's bits, which ascend with the ratio ----------------------------

constexpr int histogram_bins = 2048;

template <class F>
struct BitsOf {
    using type = int32_t;
};
template <>
struct BitsOf<double> {
    using type = int64_t;
};

// The ratio's bits above the lowest `low`, less `base`; with `nearest`, a bin beyond either end becomes the one there.
// histogram_bins where there is no bin: a ratio that is NaN (0 / 0) or negative, or, without `nearest`, beyond the ends.
template <class F>
FIUN_HD typename BitsOf<F>::type ratio_bin(F original, F merged, int low, typename BitsOf<F>::type base, bool nearest) {
    using Int = typename BitsOf<F>::type;
    constexpr Int bins = histogram_bins;
    const F ratio = merged / original;
    Int bin = (bit_cast<Int>(absolute(ratio)) >> low) - base;
    const Int inside = bin < 0 ? Int(0) : (bin < bins ? bin : bins - 1);
    bin = nearest ? inside : bin;
    return (ratio >= F(0)) & (bin == inside) ? bin : bins;
}

}  // namespace FIUN_ISA
}  // namespace fiun
