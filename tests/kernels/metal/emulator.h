// A threadgroup of Metal's threads on one of a CPU's: so many fibers, which take turns where they
// wait for each other. Single-threaded and in a fixed order, so that a run can be repeated. Each
// simdgroup goes as far as it can before the next one moves, in order or in the reverse order: what
// a missing barrier lets happen, happens.
#pragma once
#include <cstdint>

namespace emulator {

constexpr unsigned LANES = 32;

// The number of the running thread in its threadgroup.
unsigned index();

// All lanes of a simdgroup give `count` numbers (at most 8) and get everyone's: lane i's from
// i * count on. The result stays until the lane's next but one exchange.
const float* exchange(const float* mine, unsigned count);

// All threads of the threadgroup wait for each other.
void barrier();

// Runs body(context) as `threads` threads to their end; in order, or reversed.
void run(unsigned threads, bool reversed, void (*body)(void*), void* context);

}  // namespace emulator
