// A test-only stand-in for <cuda_runtime.h>: csrc/cuda compiles against it as plain C++ and runs on the CPU. Blocks and
// warps run one after another. The 32 lanes of a warp are fibers: each runs until it reaches a warp-wide operation and
// waits there for the others, as the hardware's warps do; a lane that never arrives is an error, not a hang.
// Only what csrc/cuda uses is here. Accesses check their alignment and are counted, so that tests can compare bytes.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks and warps run one after another

#define CUDART_VERSION 13000

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the lane that is running

// ---- memory --------------------------------------------------------------------------------------------------------

namespace shim {

struct Traffic {
    int64_t loaded, stored;  // bytes
    int64_t wide, narrow;    // accesses of 16 bytes, and smaller ones
    int64_t atomics;
};
extern Traffic traffic;

void misaligned(const void* address, size_t bytes);

template <class T>
inline void note(const T* address, int64_t& bytes) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) misaligned(address, sizeof(T));
    bytes += int64_t(sizeof(T));
    (sizeof(T) == 16 ? traffic.wide : traffic.narrow) += 1;
}

template <class T>
inline T load(const T* address) {
    note(address, traffic.loaded);
    T value;
    memcpy(&value, static_cast<const void*>(address), sizeof(T));
    return value;
}

template <class T>
inline void store(T* address, T value) {
    note(address, traffic.stored);
    memcpy(static_cast<void*>(address), &value, sizeof(T));
}

unsigned warp_sum(unsigned value);

}  // namespace shim

template <class T>
inline T __ldcs(const T* address) {
    return shim::load(address);
}
template <class T>
inline T __ldg(const T* address) {
    return shim::load(address);
}
template <class T>
inline void __stcs(T* address, T value) {
    shim::store(address, value);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    ++shim::traffic.atomics;
    const unsigned long long before = *address;
    *address += value;
    return before;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {  // in shared memory, which is no traffic
    const unsigned before = *address;
    *address += value;
    return before;
}

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// ---- warp ----------------------------------------------------------------------------------------------------------

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return mask == 0xffffffffu ? shim::warp_sum(value) : (shim::misaligned(nullptr, 0), 0u);
}
inline int __any_sync(unsigned mask, bool here) { return __reduce_add_sync(mask, here) > 0; }
inline int __all_sync(unsigned mask, bool here) { return __reduce_add_sync(mask, here) == 32; }
inline void __syncwarp() { shim::warp_sum(0); }

// ---- runtime -------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
};
using cudaStream_t = struct ShimStream*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace shim {
bool fails(const char* call);  // whether a test asked for this call to fail
int blocks_each();
void run_grid(dim3 grid, dim3 block, void (*thread)(void*), void* context);
}  // namespace shim

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = shim::blocks_each();
    return shim::fails("cudaOccupancyMaxActiveBlocksPerMultiprocessor") ? cudaErrorLaunchFailure : cudaSuccess;
}

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
    if (shim::fails("cudaLaunchKernel")) return cudaErrorLaunchFailure;
    struct Call {
        void (*kernel)(Args);
        const Args* args;
    } call{kernel, static_cast<const Args*>(args[0])};
    shim::run_grid(grid, block, [](void* c) { static_cast<Call*>(c)->kernel(*static_cast<Call*>(c)->args); }, &call);
    return cudaSuccess;
}
