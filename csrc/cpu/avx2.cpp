// The loops for x86-64 CPUs with AVX2, FMA and F16C. System headers come first: their code must not be compiled for it.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef FIUN_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FIUN_ISA avx2
#define FIUN_AVX2
#define FIUN_VECTOR_BYTES 32
#define FIUN_ISA_NAME "avx2"
#include "loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
