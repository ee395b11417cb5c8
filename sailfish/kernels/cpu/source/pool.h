// The threads that kernels share. One job at a time: a second caller does its work alone, on its own thread.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sailfish {

// Calls run(context, chunk) for every chunk from 0 to n - 1, on the pool's threads and the caller's, and
// returns when all have returned.
void run_chunks(void (*run)(void*, int64_t), void* context, int64_t n);

// Calls f(chunk) for every chunk from 0 to n - 1: threads claim the next chunk when they are done with one.
template <class F>
void parallel_for(int64_t n, F&& f) {
    using Body = std::remove_reference_t<F>;
    run_chunks([](void* body, int64_t chunk) { (*static_cast<Body*>(body))(chunk); },
               const_cast<void*>(static_cast<const void*>(&f)), n);
}

// The number of threads that share a job, the caller's among them.
int64_t n_threads();

}  // namespace sailfish

#define SF_EXPORT extern "C" __attribute__((visibility("default")))
