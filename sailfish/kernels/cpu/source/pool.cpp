#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace sailfish {
namespace {

using Clock = std::chrono::steady_clock;
// Longer than the gap between two kernels of a step, shorter than anybody notices.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kLooksPerClock = 64;
constexpr uint64_t kOpen = uint64_t(1) << 31;
constexpr uint64_t kInside = kOpen - 1;
constexpr int kEpochShift = 32;

// The gate is one word: the job's number, whether workers may still enter, and how many are inside. Nobody
// waits for a worker that is late: it finds the gate shut, or a later job.
struct Pool {
    std::atomic<uint64_t> gate{0};
    std::atomic<int64_t> next{0};
    void (*run)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int64_t n = 0;

    std::atomic<bool> is_busy{false};
    std::atomic<int64_t> wanted{1};
    int64_t n_workers = 0;  // written by who holds is_busy

    std::mutex mutex;
    std::condition_variable work_came;
    std::atomic<int64_t> n_parked{0};

    void claim() {
        for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < n;) run(context, chunk);
    }

    // Waits for a job other than `seen` that is open.
    uint64_t wait_for_job(uint64_t seen) {
        const auto is_new = [&](uint64_t word) { return (word & kOpen) && word >> kEpochShift != seen; };
        const auto end = Clock::now() + kSpin;
        do {
            for (int look = 0; look < kLooksPerClock; ++look) {
                const uint64_t word = gate.load(std::memory_order_acquire);
                if (is_new(word)) return word;
                _mm_pause();
            }
        } while (Clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex);
        n_parked.fetch_add(1);
        uint64_t word = gate.load();
        while (!is_new(word)) {
            work_came.wait(lock);
            word = gate.load();
        }
        n_parked.fetch_sub(1);
        return word;
    }

    void work(int64_t index) {
        for (uint64_t seen = 0;;) {
            uint64_t word = wait_for_job(seen);
            seen = word >> kEpochShift;
            if (index >= wanted.load(std::memory_order_relaxed) - 1) continue;  // fewer threads are wanted
            while ((word & kOpen) && word >> kEpochShift == seen) {
                if (!gate.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
                claim();
                gate.fetch_sub(1, std::memory_order_release);
                break;
            }
        }
    }

    void hire(int64_t count) {
        for (; n_workers < count; ++n_workers) {
            try {
                std::thread([this, index = n_workers] { work(index); }).detach();
            } catch (const std::system_error&) {
                return;  // the system has no more threads for us; those that are there do the work
            }
        }
    }

    void share(void (*job)(void*, int64_t), void* job_context, int64_t count) {
        hire(wanted.load(std::memory_order_relaxed) - 1);
        run = job;
        context = job_context;
        n = count;
        next.store(0, std::memory_order_relaxed);
        const uint64_t epoch = ((gate.load(std::memory_order_relaxed) >> kEpochShift) + 1) << kEpochShift;
        gate.store(epoch | kOpen);
        if (n_parked.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex); }
            work_came.notify_all();
        }
        claim();
        gate.fetch_and(~kOpen, std::memory_order_acq_rel);
        for (int look = 0; gate.load(std::memory_order_acquire) & kInside; ++look) {
            if (look < 4096) {
                _mm_pause();
            } else {
                sched_yield();  // a worker in the middle of a chunk waits for a core
            }
        }
    }
};

std::atomic<Pool*> pool{nullptr};

// Never freed: detached threads use it until the process ends.
Pool& the_pool() {
    Pool* found = pool.load(std::memory_order_acquire);
    if (found) return *found;
    static std::mutex making;
    std::lock_guard<std::mutex> lock(making);
    if (!pool.load()) {
        pool.store(new Pool, std::memory_order_release);
        static const int forked = pthread_atfork(nullptr, nullptr, [] {
            Pool* parent = pool.load();  // whose threads do not exist in the child
            Pool* fresh = new Pool;
            fresh->wanted.store(parent->wanted.load());
            pool.store(fresh);
        });
        (void)forked;
    }
    return *pool.load();
}

}  // namespace

void run_chunks(void (*run)(void*, int64_t), void* context, int64_t n) {
    Pool& shared = the_pool();
    const bool is_alone = n <= 1 || shared.wanted.load(std::memory_order_relaxed) <= 1 ||
                          shared.is_busy.exchange(true, std::memory_order_acquire);
    if (is_alone) {
        for (int64_t chunk = 0; chunk < n; ++chunk) run(context, chunk);
        return;
    }
    shared.share(run, context, n);
    shared.is_busy.store(false, std::memory_order_release);
}

int64_t n_threads() { return the_pool().wanted.load(std::memory_order_relaxed); }

}  // namespace sailfish

SF_EXPORT void sf_set_threads(int64_t n) { sailfish::the_pool().wanted.store(n < 1 ? 1 : n); }
