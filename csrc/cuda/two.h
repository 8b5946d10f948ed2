// Two numbers in one instruction, where the GPU has such instructions: compute capability 10, not 12.
#pragma once

#include <cuda_runtime.h>

#include "../element.h"

#define FIUN_DEVICE __device__ __forceinline__

namespace fiun {
namespace FIUN_ISA {

struct Two {
    float a, b;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
#define FIUN_TWO(operation, ...) \
    Two z; \
    asm("{ .reg .b64 x, y, w, z; mov.b64 x, {%2, %3}; mov.b64 y, {%4, %5}; " operation " mov.b64 {%0, %1}, z; }" \
        : "=f"(z.a), "=f"(z.b) : "f"(x.a), "f"(x.b), "f"(y.a), "f"(y.b) __VA_ARGS__); \
    return z;
FIUN_DEVICE Two times(Two x, Two y) { FIUN_TWO("mul.rn.f32x2 z, x, y;") }
FIUN_DEVICE Two plus(Two x, Two y) { FIUN_TWO("add.rn.f32x2 z, x, y;") }
FIUN_DEVICE Two minus(Two x, Two y) { FIUN_TWO("sub.rn.f32x2 z, x, y;") }
FIUN_DEVICE Two fused(Two x, Two y, Two w) {
    FIUN_TWO("mov.b64 w, {%6, %7}; fma.rn.f32x2 z, x, y, w;", , "f"(w.a), "f"(w.b))
}
#undef FIUN_TWO
#else
FIUN_DEVICE Two times(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
FIUN_DEVICE Two plus(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
FIUN_DEVICE Two minus(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
FIUN_DEVICE Two fused(Two x, Two y, Two w) { return {__fmaf_rn(x.a, y.a, w.a), __fmaf_rn(x.b, y.b, w.b)}; }
#endif

template <class F>
FIUN_DEVICE Two two_of(const F* numbers) {
    return {float(numbers[0]), float(numbers[1])};
}

}  // namespace FIUN_ISA
}  // namespace fiun
