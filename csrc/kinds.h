// Numbers of the dtypes, as Python hands them over: fiun_fast/kernels/extension.py has the same.
#pragma once

#include <stdint.h>

namespace fiun {

enum Kind : int { f32 = 0, f64 = 1, bf16_kind = 2, fp16_kind = 3 };
constexpr int theta_kinds = 4;   // of parameters and of gradients
constexpr int fisher_kinds = 2;  // f32, f64
constexpr int64_t kind_bytes[theta_kinds] = {4, 8, 2, 2};

}  // namespace fiun
