// What the loops need of vectors, for every instruction set: included by loops.h, compiled once for each. Arithmetic is
// what compilers have for vector types (+, -, *, /); this adds loads, masks, and the conversions of half precision.
//
// A `Mask` says for each lane yes or no: a register of bits under AVX-512, else lanes of 0 and -1. Without GNU vectors
// (MSVC) a vector is a plain number, and the same loops go one element at a time.
#pragma once

#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fiun {
namespace FIUN_ISA {

#if defined(__GNUC__)

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
using Halves = uint16_t;

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
#if defined(__GNUC__)
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

// ---- sums and bits -------------------------------------------------------------------------------------------------

// A fused multiply-add where the instruction set has one; only sums that may differ by it are computed so.
#if defined(FIUN_AVX512)
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(FIUN_AVX2)
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
inline Floats multiply_add(Floats a, Floats b, Floats c) { return c + a * b; }
#endif

#if defined(__GNUC__)
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

// ---- half precision ------------------------------------------------------------------------------------------------

inline Floats widened(const float* from) { return load(from); }
inline Doubles widened(const double* from) { return load(from); }
template <class M>
inline void store_where(M mask, float* to, Floats v) {
    store(to, select(mask, v, load(to)));
}
template <class M>
inline void store_where(M mask, double* to, Doubles v) {
    store(to, select(mask, v, load(to)));
}

#if defined(__GNUC__)
inline Floats widened(const bf16* from) {
    return bit_cast<Floats>(__builtin_convertvector(load_as<Halves>(from), Words) << 16);
}
template <class M>
inline void store_where(M mask, bf16* to, Floats v) {  // the rounding is that of `narrow` in element.h
    const Words bits = bit_cast<Words>(v), high = bits >> 16, before = __builtin_convertvector(load_as<Halves>(to), Words);
    const Words rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
    const Words number = select(at_most(v, v), rounded, high | 0x40u);  // the comparison is false for NaN
    store(to, __builtin_convertvector(select(mask, number, before), Halves));
}
#endif

#if defined(FIUN_AVX512) || defined(FIUN_AVX2) || (defined(__ARM_NEON) && defined(__aarch64__))
#define FIUN_FP16_VECTORS 1
#if defined(FIUN_AVX512)
inline Floats widen_halves(Halves h) { return _mm512_cvtph_ps(__m256i(h)); }
inline Halves narrow_halves(Floats v) { return Halves(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(FIUN_AVX2)
inline Floats widen_halves(Halves h) { return _mm256_cvtph_ps(__m128i(h)); }
inline Halves narrow_halves(Floats v) { return Halves(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline Halves select(Vector<int32_t> mask, Halves yes, Halves no) {
    const __m128i low = _mm256_castsi256_si128(__m256i(mask)), high = _mm256_extracti128_si256(__m256i(mask), 1);
    return Halves(_mm_blendv_epi8(__m128i(no), __m128i(yes), _mm_packs_epi32(low, high)));
}
#else
inline Floats widen_halves(Halves h) { return vcvt_f32_f16(float16x4_t(h)); }
inline Halves narrow_halves(Floats v) { return Halves(vcvt_f16_f32(v)); }
inline Halves select(Vector<int32_t> mask, Halves yes, Halves no) {
    const Halves k = Halves(vmovn_s32(mask));
    return (k & yes) | (~k & no);
}
#endif
inline Floats widened(const fp16* from) { return widen_halves(load_as<Halves>(from)); }
template <class M>
inline void store_where(M mask, fp16* to, Floats v) {
    store(to, select(mask, narrow_halves(v), load_as<Halves>(to)));
}
#endif

}  // namespace FIUN_ISA
}  // namespace fiun
