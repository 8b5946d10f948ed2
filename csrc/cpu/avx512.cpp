// The loops for x86-64 CPUs with AVX-512. System headers come first: their code must not be compiled for it.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef FIUN_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header starts from undefined vectors on purpose
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FIUN_ISA avx512
#define FIUN_AVX512
#define FIUN_VECTOR_BYTES 64
#define FIUN_ISA_NAME "avx512"
#include "loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
