#include "run.h"

#ifdef FIUN_X86
#include <cpuid.h>
#endif

namespace fiun {
namespace {

bool runs_here(const Kernels* kernels) {
#ifdef FIUN_X86
    __builtin_cpu_init();
    if (kernels == &avx2::kernels) {
        unsigned a, b, c = 0, d;  // not every compiler knows "f16c" by name
        return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2") &&
               __builtin_cpu_supports("fma");
    }
    if (kernels == &avx512::kernels) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return kernels == &baseline::kernels;
}

}  // namespace

std::vector<const Kernels*> compiled_kernels() {
#ifdef FIUN_X86
    return {&avx512::kernels, &avx2::kernels, &baseline::kernels};
#else
    return {&baseline::kernels};
#endif
}

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
    for (const Kernels* kernels : compiled_kernels()) {
        if (runs_here(kernels)) usable.push_back(kernels);
    }
    return usable;
}

}  // namespace fiun
