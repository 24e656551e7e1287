// Files mapped into memory. A file that is cut short while it is mapped kills whoever touches its
// lost pages (SIGBUS). Here a signal handler puts zeros in their place and remembers the fact, so
// that Python can raise an error once the operation has ended.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <system_error>
#include <tuple>

namespace mapping {

// What the handler knows of a mapping. It must not take locks, so mappings stand in a fixed table.
struct Slot {
  std::atomic<int64_t> id{0};  // 0: free
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<int64_t> cut{-1};  // the first byte that was missing; -1: none
};

constexpr int SLOTS = 1024;
inline Slot slots[SLOTS];
inline std::atomic<int32_t> cuts{0};  // of all mappings so far; read by Python at every step
inline struct sigaction previous_action;
inline uintptr_t page_size = 4096;

inline bool replace_lost_pages(uintptr_t address) {
  for (Slot& slot : slots) {
    uintptr_t begin = slot.begin.load(), end = slot.end.load();
    if (address < begin || address >= end) continue;
    uintptr_t page = address & ~(page_size - 1);
    // Not in POSIX's list of functions for signal handlers, but a plain system call here.
    void* made = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (made == MAP_FAILED) return false;
    int64_t missing = static_cast<int64_t>(page - begin), first = slot.cut.load();
    while ((first < 0 || missing < first) && !slot.cut.compare_exchange_weak(first, missing)) {
    }
    cuts.fetch_add(1);
    return true;
  }
  return false;
}

inline void on_bus_error(int number, siginfo_t* info, void* context) {
  int saved = errno;
  bool mended = info->si_code > 0 && replace_lost_pages(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = saved;
  if (mended) return;
  if (previous_action.sa_flags & SA_SIGINFO) {
    previous_action.sa_sigaction(number, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(number);
  } else {
    // As if there were no handler: the instruction is repeated, or the signal sent again.
    struct sigaction plain = {};
    plain.sa_handler = SIG_DFL;
    sigaction(number, &plain, nullptr);
    if (info->si_code <= 0) raise(number);
  }
}

inline void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous_action);
  });
}

// A whole file, read-only; unmapped when the last array over it goes.
class Mapping {
 public:
  char* data = nullptr;
  size_t length = 0;  // of the file, in bytes
  int64_t id = 0;     // never used again

  // The mapping of an open file: the one that there is, if it is mapped already.
  static std::shared_ptr<Mapping> of(int descriptor) {
    struct stat status;
    if (fstat(descriptor, &status)) throw std::system_error(errno, std::generic_category());
    using Key = std::tuple<dev_t, ino_t, off_t, time_t>;
    static std::mutex mutex;
    static std::map<Key, std::weak_ptr<Mapping>> known;
    std::lock_guard<std::mutex> lock(mutex);
    Key key{status.st_dev, status.st_ino, status.st_size, status.st_mtime};
    std::shared_ptr<Mapping> mapping = known[key].lock();
    // One that lost pages is of no more use: a file that is whole again is mapped anew.
    if (mapping && mapping->slot_->cut.load() < 0) return mapping;
    mapping = std::make_shared<Mapping>(descriptor, static_cast<size_t>(status.st_size));
    known[key] = mapping;
    return mapping;
  }

  Mapping(int descriptor, size_t size) : length(size) {
    static std::atomic<int64_t> last{0};
    install_handler();
    for (Slot& slot : slots) {
      int64_t unused = 0, next = last.fetch_add(1) + 1;
      if (!slot.id.compare_exchange_strong(unused, next)) continue;
      slot_ = &slot, id = next;
      break;
    }
    if (!slot_) throw std::system_error(EMFILE, std::generic_category());
    void* room = mmap(nullptr, reserved(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) fail();
    data = static_cast<char*>(room) + page_size;
    std::memcpy(data - sizeof length, &length, sizeof length);
    if (mmap(data, length, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED) {
      int problem = errno;
      munmap(room, reserved());
      errno = problem;
      fail();
    }
    slot_->cut.store(-1);
    slot_->begin.store(reinterpret_cast<uintptr_t>(data));
    slot_->end.store(reinterpret_cast<uintptr_t>(data) + reserved() - page_size);
  }

  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  ~Mapping() {
    slot_->end.store(0), slot_->begin.store(0);
    munmap(data - page_size, reserved());
    slot_->id.store(0);
  }

 private:
  // Of addresses, in whole pages: one before the file, which ends with the file's length. That is
  // where MLX's CPU allocator looks for the size of a buffer.
  size_t reserved() const {
    return page_size + ((length + page_size - 1) & ~(page_size - 1));
  }

  [[noreturn]] void fail() {
    int problem = errno;
    slot_->id.store(0);
    throw std::system_error(problem, std::generic_category());
  }

  Slot* slot_ = nullptr;
};

// The first byte that was missing in a mapping; -1 where none was, or it is no longer mapped.
inline int64_t first_missing(int64_t id) {
  for (Slot& slot : slots) {
    if (slot.id.load() == id) return slot.cut.load();
  }
  return -1;
}

}  // namespace mapping
