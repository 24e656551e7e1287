#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(fake, ...) (void)(fake)
#define __sanitizer_finish_switch_fiber(fake, ...) (void)(fake)
#endif

namespace emulator {
namespace {

constexpr size_t STACK = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  void* fake = nullptr;  // the sanitizer's own
  unsigned exchanges = 0, barriers = 0;
  bool done = false;
};

struct Simdgroup {
  float given[2][LANES * 8];
  unsigned arrived[2] = {0, 0};
};

// Stacks are used again by the next threadgroup.
std::vector<Fiber>& fibers() {
  static std::vector<Fiber> all;
  return all;
}

struct Group {
  ucontext_t main;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  unsigned threads, now = 0, waiting = 0, barriers = 0, left;
  std::vector<Simdgroup> simdgroups;
  void (*body)(void*);
  void* given;
} *group;

void leave() {
  Fiber& self = fibers()[group->now];
  __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake, group->main_stack,
                                 group->main_size);
  swapcontext(&self.context, &group->main);
  __sanitizer_finish_switch_fiber(self.fake, nullptr, nullptr);
}

void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &group->main_stack, &group->main_size);
  group->body(group->given);
  fibers()[group->now].done = true;
  group->left--;
  leave();
}

void resume(unsigned thread) {
  Fiber& fiber = fibers()[group->now = thread];
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.data(), STACK);
  swapcontext(&group->main, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

// Whether any of a simdgroup's threads moved, until all are at a barrier or at their end.
bool advance(unsigned simdgroup, bool reversed) {
  const unsigned first = simdgroup * LANES;
  const unsigned end = std::min(first + LANES, group->threads);
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = first; i < end; i++) {
      const unsigned thread = reversed ? end - 1 - (i - first) : i;
      const Fiber& fiber = fibers()[thread];
      if (fiber.done || fiber.barriers > group->barriers) continue;
      resume(thread);
      again = moved = true;
    }
  }
  return moved;
}

}  // namespace

unsigned index() { return group->now; }

const float* exchange(const float* mine, unsigned count) {
  Fiber& self = fibers()[group->now];
  Simdgroup& simd = group->simdgroups[group->now / LANES];
  const unsigned side = self.exchanges++ & 1;
  if (simd.arrived[side] == LANES) simd.arrived[side] = 0;
  std::memcpy(simd.given[side] + group->now % LANES * count, mine, count * sizeof(float));
  simd.arrived[side]++;
  while (simd.arrived[side] < LANES) leave();
  return simd.given[side];
}

void barrier() {
  Fiber& self = fibers()[group->now];
  self.barriers++;
  if (++group->waiting == group->threads) {
    group->waiting = 0;
    group->barriers++;
  }
  while (group->barriers < self.barriers) leave();
}

void run(unsigned threads, bool reversed, void (*body)(void*), void* context) {
  Group here{};
  here.threads = here.left = threads;
  here.simdgroups.resize((threads + LANES - 1) / LANES);
  here.body = body;
  here.given = context;
  group = &here;
  if (fibers().size() < threads) fibers() = std::vector<Fiber>(threads);
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers()[i];
    fiber.exchanges = fiber.barriers = 0;
    fiber.done = false;
    fiber.fake = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  // Each simdgroup goes as far as it can before the next one moves.
  const unsigned simdgroups = here.simdgroups.size();
  while (here.left) {
    bool moved = false;
    for (unsigned i = 0; i < simdgroups; i++)
      moved |= advance(reversed ? simdgroups - 1 - i : i, reversed);
    if (!moved) {
      std::fputs("the threads of a threadgroup wait for each other for ever\n", stderr);
      std::abort();
    }
  }
  group = nullptr;
}

}  // namespace emulator
