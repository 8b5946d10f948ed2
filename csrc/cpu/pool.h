// Threads to run on: those of the OpenMP runtime that torch has brought along, else a pool of our own.
//
// Torch's threads first, because after every parallel operation of torch they spin for milliseconds waiting for the next;
// a second set of threads would compete with them for the cores. They are reached through GOMP_parallel, the entry that
// compilers call, found at run time: nothing is linked, so that a wheel brings no second OpenMP runtime.
// The pool is for where there is none, and for children of fork (DataLoader workers): a child has none of its parent's
// threads, and GNU OpenMP would wait for them for ever. The pool starts afresh.
#pragma once

#include <stdint.h>

namespace fiun {

// Calls work(context, thread), thread < threads, on `threads` threads at most, the caller among them; returns when all
// have. Fewer may take part, so work must be shared out as it is asked for. It must not throw, nor call this.
void on_threads(int threads, void (*work)(void* context, int thread), void* context);

// The address of GOMP_parallel, or 0 for the pool.
void use_openmp(int64_t address);

}  // namespace fiun
