#include "dampen.h"

namespace fiun {

DampenKernel dampen_signed_kernel_f32(int theta_kind, bool with_exponent) {
    return common::dampen_kernel<true, float>(theta_kind, with_exponent);
}

}  // namespace fiun
