// Parameters and gradients as vectors of what they meet: half precision is widened to floats, and rounded once when it is
// stored. Included by loops.h, after vector.h.
#pragma once

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#endif

namespace fiun {
namespace FIUN_ISA {

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

#if defined(FIUN_GNU_VECTORS)
inline Floats widened(const bf16* from) {
    return bit_cast<Floats>(__builtin_convertvector(load_as<Halves>(from), Words) << 16);
}
// Rounds as `narrow` in element.h, but for NaN: here it comes from a bf16 or from inf * 0, and keeps a bit in its upper half.
template <class M>
inline void store_where(M mask, bf16* to, Floats v) {
    const Words bits = bit_cast<Words>(v), before = __builtin_convertvector(load_as<Halves>(to), Words);
    const Words next = select(mask, (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, before);
#if defined(FIUN_AVX2)
    store(to, _mm_packus_epi32(_mm256_castsi256_si128(__m256i(next)), _mm256_extracti128_si256(__m256i(next), 1)));
#else
    store(to, __builtin_convertvector(next, Halves));
#endif
}
#endif

#if defined(FIUN_GNU_VECTORS) && (defined(FIUN_AVX512) || defined(FIUN_AVX2) || defined(__aarch64__))
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

// Whether a vector of F and one of T, once widened, are alike.
template <class T, class F>
constexpr bool has_vectors = false;
template <class F>
constexpr bool has_vectors<F, F> = true;
#if defined(FIUN_GNU_VECTORS)
template <>
constexpr bool has_vectors<bf16, float> = true;
#endif
#if defined(FIUN_FP16_VECTORS)
template <>
constexpr bool has_vectors<fp16, float> = true;
#endif

}  // namespace FIUN_ISA
}  // namespace fiun
