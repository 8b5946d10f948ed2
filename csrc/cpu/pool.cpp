#include "pool.h"

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace fiun {
namespace {

// Rounding to nearest and gradual underflow on every thread, whatever the caller has set (torch.set_flush_denormal):
// the result must not depend on which thread computes it.
struct DefaultArithmetic {
    std::fenv_t before;
    DefaultArithmetic() {
        std::fegetenv(&before);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { std::fesetenv(&before); }
    DefaultArithmetic(const DefaultArithmetic&) = delete;
    DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;
};

class Pool {
  public:
    void run(int threads, void (*body)(void*, int), void* data) {
        std::lock_guard<std::mutex> one_job_at_a_time(turn_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(threads - 1);
            body_ = body;
            data_ = data;
            wanted_ = threads - 1 < helpers_ ? threads - 1 : helpers_;
            running_ = wanted_;
            ++job_;
        }
        wake_.notify_all();
        body(data, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

  private:
    void grow(int helpers) {  // with mutex_ held
        try {
            for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this, helpers_ + 1, job_).detach();
        } catch (const std::system_error&) {
            // the system allows no more threads: those that exist do the work
        }
    }

    void help(int thread, int64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return job_ != seen; });
            seen = job_;
            if (thread > wanted_) continue;
            lock.unlock();
            body_(data_, thread);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    void (*body_)(void*, int) = nullptr;
    void* data_ = nullptr;
    int helpers_ = 0, wanted_ = 0, running_ = 0;
    int64_t job_ = 0;
};

// Never freed: its threads wait in it until the process ends. After a fork the child forgets it, locks and all.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* found = current.load(std::memory_order_acquire);
    if (found) return *found;
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
    return *found;
}

using OpenMp = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMp> openmp{nullptr};
std::atomic<int (*)()> openmp_thread{nullptr};

#ifndef _WIN32
const int watch_forks = pthread_atfork(nullptr, nullptr, [] {
    current.store(nullptr);
    openmp.store(nullptr);
});
#endif

struct Job {
    void (*work)(void*, int);
    void* context;
};

void take_part(void* data, int thread) {
    const Job& job = *static_cast<Job*>(data);
    DefaultArithmetic arithmetic;
    job.work(job.context, thread);
}

}  // namespace

void use_openmp(int64_t parallel, int64_t thread_number) {
    openmp_thread.store(reinterpret_cast<int (*)()>(thread_number));
    openmp.store(thread_number ? reinterpret_cast<OpenMp>(parallel) : nullptr);
}

void on_threads(int threads, void (*work)(void*, int), void* context) {
    Job job{work, context};
    if (threads <= 1) {
        take_part(&job, 0);
    } else if (const OpenMp parallel = openmp.load()) {
        parallel([](void* data) { take_part(data, openmp_thread.load()()); }, &job, unsigned(threads), 0);
    } else {
        pool().run(threads, take_part, &job);
    }
}

}  // namespace fiun
