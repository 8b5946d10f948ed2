#include "dampen.h"

namespace fiun {

DampenKernel dampen_kernel_f32(int theta_kind, bool with_exponent) {
    return common::dampen_kernel<false, float>(theta_kind, with_exponent);
}

}  // namespace fiun
