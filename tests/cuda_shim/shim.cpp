#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

#include "shim.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

Traffic traffic;

namespace {

constexpr int lanes = 32;
constexpr size_t stack_bytes = 256 << 10;

struct Machine {
    int processors = 2, blocks_each = 2, device = 0, devices = 2;
    std::string failing;
} machine;

// The warp that runs: its fibers take turns, each until it waits or is done.
struct Warp {
    ucontext_t caller, fibers[lanes];
    std::unique_ptr<char[]> stacks{new char[lanes * stack_bytes]};
    bool done[lanes];
    int running;
    unsigned values[2][lanes], operations[lanes];
    void (*thread)(void*);
    void* context;
} warp;

[[noreturn]] void stop(const char* why) {
    fprintf(stderr, "cuda shim: %s\n", why);
    abort();
}

void switch_to(ucontext_t* from, ucontext_t* to, const void* stack, size_t bytes, bool leaving) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(leaving ? nullptr : &fake, stack, bytes);
    swapcontext(from, to);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    (void)stack, (void)bytes, (void)leaving;
    swapcontext(from, to);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
const void* caller_stack;
size_t caller_bytes;
#else
constexpr const void* caller_stack = nullptr;
constexpr size_t caller_bytes = 0;
#endif

void to_caller(bool leaving) { switch_to(&warp.fibers[warp.running], &warp.caller, caller_stack, caller_bytes, leaving); }

void fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &caller_stack, &caller_bytes);
#endif
    warp.thread(warp.context);
    warp.done[warp.running] = true;
    to_caller(true);
}

void resume(int lane, unsigned first_thread) {
    warp.running = lane;
    threadIdx.x = first_thread + unsigned(lane);
    switch_to(&warp.caller, &warp.fibers[lane], &warp.stacks[lane * stack_bytes], stack_bytes, false);
}

void prepare(int lane) {
    getcontext(&warp.fibers[lane]);
    warp.fibers[lane].uc_stack.ss_sp = &warp.stacks[lane * stack_bytes];
    warp.fibers[lane].uc_stack.ss_size = stack_bytes;
    warp.fibers[lane].uc_link = nullptr;
    makecontext(&warp.fibers[lane], fiber, 0);
    warp.done[lane] = false;
    warp.operations[lane] = 0;
}

void run_warp(unsigned first_thread) {
    for (int lane = 0; lane < lanes; ++lane) prepare(lane);
    for (int finished = 0; finished == 0;) {
        for (int lane = 0; lane < lanes; ++lane) resume(lane, first_thread);
        for (int lane = 0; lane < lanes; ++lane) finished += warp.done[lane];
        if (finished != 0 && finished != lanes) stop("some lanes of a warp ended while others wait for them");
    }
}

}  // namespace

unsigned warp_sum(unsigned value) {
    const int lane = warp.running;
    unsigned* const values = warp.values[warp.operations[lane]++ % 2];  // two: early lanes are one operation ahead of late ones
    values[lane] = value;
    to_caller(false);  // comes back when all lanes have left their value
    unsigned sum = 0;
    for (int other = 0; other < lanes; ++other) sum += values[other];
    return sum;
}

void misaligned(const void* address, size_t bytes) {
    fprintf(stderr, "access of %zu bytes at %p\n", bytes, address);
    stop("misaligned access, or a warp operation without all lanes");
}

void run_grid(dim3 grid, dim3 block, void (*thread)(void*), void* context) {
    gridDim = grid;
    blockDim = block;
    warp.thread = thread;
    warp.context = context;
    if (grid.x == 0 || block.x % lanes != 0) stop("empty grid, or a block that is not made of whole warps");
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        for (unsigned first = 0; first < block.x; first += lanes) run_warp(first);
    }
}

bool fails(const char* call) { return machine.failing == call; }
int blocks_each() { return machine.blocks_each; }

}  // namespace shim

using shim::fails;
using shim::machine;

void shim_set_machine(int processors, int blocks_each) {
    machine.processors = processors;
    machine.blocks_each = blocks_each;
}
void shim_set_failing(const char* call) { machine.failing = call; }
int shim_current_device() { return machine.device; }
void shim_take_traffic(int64_t* counters) {
    const shim::Traffic& t = shim::traffic;
    const int64_t now[] = {t.loaded, t.stored, t.wide, t.narrow, t.atomics};
    memcpy(counters, now, sizeof(now));
    shim::traffic = {};
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorLaunchFailure";
}
const char* cudaGetErrorString(cudaError_t) { return "made to fail by a test"; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return fails("cudaDriverGetVersion") ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = machine.devices;
    return fails("cudaGetDeviceCount") ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = machine.device;
    return fails("cudaGetDevice") ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= machine.devices) return cudaErrorInvalidDevice;
    machine.device = device;
    return fails("cudaSetDevice") ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? machine.processors : 9 * (attribute == cudaDevAttrComputeCapabilityMajor);
    return fails("cudaDeviceGetAttribute") ? cudaErrorLaunchFailure : cudaSuccess;
}
