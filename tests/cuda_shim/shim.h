// What tests may set and see of the shim, through ctypes.
#pragma once

#include <stdint.h>

extern "C" {
void shim_set_machine(int processors, int blocks_each);  // size of the pretended GPU
void shim_set_failing(const char* call);                 // this runtime call fails from now on; "" for none
int shim_current_device();
void shim_take_traffic(int64_t* counters);  // [5]: bytes loaded, bytes stored, 16-byte accesses, others, atomics; zeroed
}
