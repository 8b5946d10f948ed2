// What the loops need of vectors, for every instruction set: included by loops.h, compiled once for each. Arithmetic is
// what compilers have for vector types (+, -, *, /); this adds loads, masks, and sums. halves.h has the conversions.
//
// A `Mask` says for each lane yes or no: a register of bits under AVX-512, else lanes of 0 and -1. Without GNU vectors
// (MSVC; elsewhere with FIUN_ONE_LANE) a vector is a plain number, and the same loops go one element at a time.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fiun {
namespace FIUN_ISA {

#if defined(__GNUC__) && !defined(FIUN_ONE_LANE)
#define FIUN_GNU_VECTORS 1

#ifndef FIUN_VECTOR_BYTES
#define FIUN_VECTOR_BYTES 16  // what every x86-64 (SSE2) and every arm64 (NEON) has
#endif

template <class N>
struct VectorOf {
    typedef N type __attribute__((vector_size(FIUN_VECTOR_BYTES)));
};
template <class N>
constexpr int lanes = int(FIUN_VECTOR_BYTES / sizeof(N));
using Bytes = VectorOf<uint8_t>::type;
using Halves = uint16_t __attribute__((vector_size(FIUN_VECTOR_BYTES / 2)));

template <class N>
inline typename VectorOf<N>::type spread(N x) {
    return x - typename VectorOf<N>::type{};
}

#else

template <class N>
struct VectorOf {
    using type = N;
};
template <class N>
constexpr int lanes = 1;
using Bytes = bool;

template <class N>
inline N spread(N x) {
    return x;
}

#endif

template <class N>
using Vector = typename VectorOf<N>::type;
using Floats = Vector<float>;
using Doubles = Vector<double>;
using Words = Vector<uint32_t>;

template <class V, class N>
inline V load_as(const N* from) {
    V v;
    memcpy(&v, from, sizeof(V));
    return v;
}
template <class N>
inline Vector<N> load(const N* from) {
    return load_as<Vector<N>>(from);
}
template <class V, class N>
inline void store(N* to, V v) {
    memcpy(to, &v, sizeof(V));
}

// ---- masks ---------------------------------------------------------------------------------------------------------

#if defined(FIUN_AVX512)

inline __mmask16 greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline __mmask8 greater(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
inline __mmask16 at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline __mmask8 at_most(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
inline __mmask16 both(__mmask16 a, __mmask16 b) { return a & b; }
inline __mmask8 both(__mmask8 a, __mmask8 b) { return a & b; }
inline __mmask16 either(__mmask16 a, __mmask16 b) { return a | b; }
inline __mmask8 either(__mmask8 a, __mmask8 b) { return a | b; }
inline bool any(unsigned mask) { return mask != 0; }
inline Floats select(__mmask16 k, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, k, yes); }
inline Doubles select(__mmask8 k, Doubles yes, Doubles no) { return _mm512_mask_mov_pd(no, k, yes); }
inline Words select(__mmask16 k, Words yes, Words no) {
    return Words(_mm512_mask_mov_epi32(__m512i(no), k, __m512i(yes)));
}
inline Halves select(__mmask16 k, Halves yes, Halves no) {
    return Halves(_mm256_mask_mov_epi16(__m256i(no), k, __m256i(yes)));
}
inline Floats lesser(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline Doubles lesser(Doubles a, Doubles b) { return _mm512_min_pd(a, b); }
inline Floats greater_of(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Doubles greater_of(Doubles a, Doubles b) { return _mm512_max_pd(a, b); }
// a / b in the lanes of the mask, 0 in the others, which are not divided at all: a subnormal there would cost dearly
inline Floats divide(__mmask16 k, Floats a, Floats b) { return _mm512_maskz_div_ps(k, a, b); }
inline Doubles divide(__mmask8 k, Doubles a, Doubles b) { return _mm512_maskz_div_pd(k, a, b); }
inline Vector<int32_t> counted(Vector<int32_t> so_far, __mmask16 k) {
    const __m512i n = __m512i(so_far);
    return Vector<int32_t>(_mm512_mask_sub_epi32(n, k, n, _mm512_set1_epi32(-1)));
}
inline Vector<int64_t> counted(Vector<int64_t> so_far, __mmask8 k) {
    const __m512i n = __m512i(so_far);
    return Vector<int64_t>(_mm512_mask_sub_epi64(n, k, n, _mm512_set1_epi64(-1)));
}

#else

template <class V>
inline auto greater(V a, V b) {
    return a > b;
}
template <class V>
inline auto at_most(V a, V b) {
    return a <= b;
}
template <class M>
inline M both(M a, M b) {
    return a & b;
}
template <class M>
inline M either(M a, M b) {
#if defined(FIUN_AVX2)
    return M(_mm256_or_si256(__m256i(a), __m256i(b)));  // of two comparisons GCC makes a blend instead
#else
    return a | b;
#endif
}
template <class M, class V>
inline V select(M mask, V yes, V no) {
    return mask ? yes : no;
}
template <class V>
inline V lesser(V a, V b) {
    return a < b ? a : b;
}
template <class V>
inline V greater_of(V a, V b) {
    return a > b ? a : b;
}
template <class M, class V>
inline V divide(M mask, V a, V b) {
    return mask ? a / b : V{};
}
#if defined(FIUN_GNU_VECTORS)
template <class M>
inline M counted(M so_far, M mask) {
    return so_far - mask;
}
template <class M>
inline bool any(M mask) {
#if defined(FIUN_AVX2)
    return _mm256_movemask_ps(__m256(mask)) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_epi8(__m128i(mask)) != 0;
#else
    const auto halves = bit_cast<Vector<uint64_t>>(mask);
    return (halves[0] | halves[1]) != 0;
#endif
}
#else
template <class I>
inline I counted(I so_far, bool mask) {
    return so_far + I(mask);
}
inline bool any(bool mask) { return mask; }
#endif

#endif

// Where a and b have opposite signs, and neither is 0 or NaN.
template <class V>
inline auto opposed(V a, V b) {
    const V zero{};
    return either(both(greater(zero, a), greater(b, zero)), both(greater(a, zero), greater(zero, b)));
}

// ---- sums and bits -------------------------------------------------------------------------------------------------

// A fused multiply-add where the instruction set has one; only sums that may differ by it are computed so.
#if defined(FIUN_AVX512)
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(FIUN_AVX2)
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
inline Floats multiply_add(Floats a, Floats b, Floats c) { return c + a * b; }
#endif

#if defined(FIUN_GNU_VECTORS)
inline Floats positive(Floats v) { return bit_cast<Floats>(bit_cast<Words>(v) & 0x7fffffffu); }
inline Doubles positive(Doubles v) { return bit_cast<Doubles>(bit_cast<Vector<uint64_t>>(v) & (~uint64_t(0) >> 1)); }

// The largest of each byte, which one instruction finds everywhere.
template <class V>
inline Bytes larger_bytes(Bytes so_far, V v) {
    const Bytes bytes = bit_cast<Bytes>(v);
    return so_far > bytes ? so_far : bytes;
}
// Whether numbers of type F with such bytes may have been inf or NaN: those, the very large and the negative.
template <class F>
inline bool beyond_finite(Bytes largest) {
    const auto bits = bit_cast<Vector<typename BitsOf<F>::type>>(largest);
    bool beyond = false;
    for (int i = 0; i < lanes<F>; ++i) beyond |= (bits[i] < 0) | (bits[i] >> (8 * sizeof(F) - 8) == 0x7f);
    return beyond;
}
template <class V>
inline int64_t total(V counts) {
    int64_t sum = 0;
    for (int i = 0; i < int(sizeof(V) / sizeof(counts[0])); ++i) sum += counts[i];
    return sum;
}
#else
inline float positive(float v) { return absolute(v); }
inline double positive(double v) { return absolute(v); }
template <class F>
inline bool larger_bytes(bool so_far, F v) {
    return so_far | !is_finite(v);
}
template <class F>
inline bool beyond_finite(bool found) {
    return found;
}
inline int64_t total(int64_t count) { return count; }
#endif

}  // namespace FIUN_ISA
}  // namespace fiun
