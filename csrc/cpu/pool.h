// Threads to run on: those of the OpenMP runtime that torch has brought along, else a pool of our own.
//
// Torch's threads first, because after every parallel operation of torch they spin for milliseconds waiting for the next;
// a second set of threads would compete with them for the cores. They are reached through GOMP_parallel, the entry that
// compilers call, found at run time: nothing is linked, so that a wheel brings no second OpenMP runtime.
// The pool is for where there is none, and for children of fork (DataLoader workers): a child has none of its parent's
// threads, and GNU OpenMP would wait for them for ever. The pool starts afresh.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <vector>

namespace fiun {

// Calls work(context, thread), thread < threads, on `threads` threads at most, the caller among them; returns when all
// have. A thread has the same number each time. Fewer may take part, so work must be shared out as it is asked for. It
// must not throw, nor call this.
void on_threads(int threads, void (*work)(void* context, int thread), void* context);

// The addresses of GOMP_parallel and omp_get_thread_num, or 0 for the pool.
void use_openmp(int64_t parallel, int64_t thread_number);

// Where the t-th of `parts` stretches of 0 .. count - 1 begins.
inline int64_t stretch_start(int64_t count, int64_t parts, int64_t t) {
    return count / parts * t + count % parts * t / parts;
}

// Shares out the numbers 0 .. count - 1: body(number, thread). Each thread begins with a stretch of its own, the same in
// every call, so that it comes back to the memory that it touched first (on a machine with several memories: its own);
// who is done goes on with what others have left.
template <class Body>
void share_out(int64_t count, int threads, Body& body) {
    struct alignas(64) Stretch {  // a cache line each
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    struct Shared {
        std::vector<Stretch> stretches;
        Body& body;
    } shared{std::vector<Stretch>(size_t(threads < count ? threads : count)), body};
    const int64_t parts = int64_t(shared.stretches.size());
    for (int64_t t = 0; t < parts; ++t) {
        shared.stretches[size_t(t)].next = stretch_start(count, parts, t);
        shared.stretches[size_t(t)].end = stretch_start(count, parts, t + 1);
    }
    const auto work = [](void* context, int thread) {
        Shared& s = *static_cast<Shared*>(context);
        const size_t parts = s.stretches.size();
        for (size_t i = 0; i < parts; ++i) {
            Stretch& stretch = s.stretches[(size_t(thread) + i) % parts];
            for (int64_t n; (n = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) s.body(n, thread);
        }
    };
    if (parts > 0) on_threads(int(parts), work, &shared);
}

}  // namespace fiun
