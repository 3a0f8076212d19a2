// Compiled without sanitizers: they are told about fibers and barriers instead, and do not see the runner's own data.
#include "runner.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "context.h"
#include "cuda_runtime.h"

// Of the sanitizers' runtimes, which are there or not.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace riskmap::cuda_on_host {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber_no_sync: a switch orders nothing, only barriers do
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 << 10;  // of a block, without asking for more
// Fibers that the blocks of a grid take turns with under ThreadSanitizer, which sees what happens on one fiber in
// order: only blocks of different seats are unordered. A fiber costs it a quarter of a megabyte.
constexpr size_t kSeats = 4;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fflush(stdout);
  std::fputs("cuda_on_host: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  std::abort();
}

// Only its address counts: what is released to it and acquired from it is ordered for ThreadSanitizer.
using SyncPoint = char;

void release(SyncPoint& point) {
  if (__tsan_release) __tsan_release(&point);
}
void acquire(SyncPoint& point) {
  if (__tsan_acquire) __tsan_acquire(&point);
}

enum class State { kReady, kAtBarrier, kAtWarp, kExited };

struct Fiber {
  Context context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  uint3 index{};
  int linear = 0;
  State state = State::kReady;
  Site site{};
  unsigned mask = 0;  // of the warp operation it waits at
  uint64_t value = 0, result = 0;
  int source = 0;
  unsigned ballot = 0;

  Fiber() {
    stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // an overflow ends here
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { munmap(stack, kStack); }
};

struct Warp {
  unsigned waiting = 0;  // lanes at a warp operation
  unsigned phase = 0;
  SyncPoint points[2];
};

// Allocated anew for every block: ThreadSanitizer forgets what was released to it with the memory.
struct Block {
  explicit Block(int threads) : warps(static_cast<size_t>((threads + kWarp - 1) / kWarp)) {}

  std::vector<Warp> warps;
  int at_barrier = 0;
  unsigned phase = 0;
  SyncPoint start, points[2];
};

thread_local volatile unsigned char anchor;  // touched, it brings the thread-local storage of this library into being

// The shared memory of the kernels: the thread-local storage of the library or program they are in.
struct SharedMemory {
  unsigned char* begin = nullptr;
  size_t size = 0;

  SharedMemory() {
    anchor = 0;
    dl_iterate_phdr(&SharedMemory::find, this);
  }

  static int find(dl_phdr_info* info, size_t, void* self) {
    const auto address = reinterpret_cast<ElfW(Addr)>(&run_grid);
    bool here = false;
    size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr) & header = info->dlpi_phdr[i];
      const ElfW(Addr) start = info->dlpi_addr + header.p_vaddr;
      if (header.p_type == PT_LOAD && address >= start && address < start + header.p_memsz) here = true;
      if (header.p_type == PT_TLS) size = header.p_memsz;
    }
    if (!here) return 0;
    static_cast<SharedMemory*>(self)->begin = static_cast<unsigned char*>(info->dlpi_tls_data);
    static_cast<SharedMemory*>(self)->size = size;
    return 1;
  }

  // By hand: ThreadSanitizer would take a memset for an access of the running thread.
  void fill() const {
    volatile uint64_t* words = reinterpret_cast<uint64_t*>(begin);
    for (size_t i = 0; begin && i < size / sizeof(uint64_t); ++i) words[i] = ~uint64_t{0};
  }
};

class Order {
 public:
  Order() {
    const char* text = std::getenv("RISKMAP_CUDA_ON_HOST_ORDER");
    const std::string name = text ? text : "forward";
    if (name == "reverse") {
      kind_ = kReverse;
    } else if (name.rfind("random:", 0) == 0 && name.size() > 7 &&
               name.find_first_not_of("0123456789", 7) == std::string::npos) {
      kind_ = kRandom;
      generator_.seed(std::stoull(name.substr(7)));
    } else if (name != "forward") {
      fail("RISKMAP_CUDA_ON_HOST_ORDER must be forward, reverse or random:SEED, got '%s'", name.c_str());
    }
  }

  bool is_random() const { return kind_ == kRandom; }

  template <class T>
  void arrange(std::vector<T>& items) {
    if (kind_ == kReverse) std::reverse(items.begin(), items.end());
    if (kind_ == kRandom) std::shuffle(items.begin(), items.end(), generator_);
  }

 private:
  enum { kForward, kReverse, kRandom } kind_ = kForward;
  std::mt19937_64 generator_;
};

class Runner {
 public:
  void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* context) {
    body_ = body;
    context_ = context;
    shared_bytes_ = shared_bytes;
    threads_ = static_cast<int>(block.x * block.y * block.z);
    blockDim = block;
    gridDim = grid;
    Order order;
    std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), uint64_t{0});
    order.arrange(blocks);
    for (size_t turn = 0; turn < blocks.size(); ++turn) {
      const uint64_t b = blocks[turn];
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      if (__tsan_create_fiber) {
        // Other fibers than the last block's, and shared memory (of a thread) that is new to ThreadSanitizer: nothing
        // orders threads of different blocks.
        seat_ = &seats_[turn % kSeats];
        std::thread([&] { run_block(order); }).join();
      } else {
        run_block(order);
      }
    }
    acquire(grid_done_);  // what the kernel wrote is there for the host
    shared_.clear();
  }

  Fiber& current() { return *current_; }
  char* shared() { return shared_.back().get(); }

  // Leaves the running thread in `state`; comes back when it may go on.
  void wait(State state, Site site) {
    Fiber& fiber = *current_;
    fiber.state = state;
    fiber.site = site;
    if (state == State::kExited) release(grid_done_);
    switch_to(nullptr);
  }

  void barrier(Site site) {
    SyncPoint& point = block_->points[block_->phase & 1];
    release(point);
    wait(State::kAtBarrier, site);
    acquire(point);
  }

  void warp(unsigned mask, Site site, bool synchronise) {
    Fiber& fiber = *current_;
    const int own_lane = fiber.linear % kWarp;
    const int lanes = std::min(kWarp, threads_ - fiber.linear / kWarp * kWarp);
    if (!(mask >> own_lane & 1))
      fail_site(site, "is called by lane %d, which its mask 0x%08x leaves out", own_lane, mask);
    if (lanes < kWarp && mask >> lanes)
      fail_site(site, "has mask 0x%08x, but this warp has only %d lanes", mask, lanes);
    fiber.mask = mask;
    Warp& warp = block_->warps[static_cast<size_t>(fiber.linear / kWarp)];
    SyncPoint& point = warp.points[warp.phase & 1];
    if (synchronise) release(point);
    wait(State::kAtWarp, site);
    if (synchronise) acquire(point);
  }

  template <class... Arguments>
  [[noreturn]] static void fail_site(Site site, const char* format, Arguments... arguments) {
    char text[256];
    std::snprintf(text, sizeof(text), format, arguments...);
    fail("%s in %s:%d, block (%u, %u, %u), thread (%u, %u, %u), %s", site.what, site.file, site.line, blockIdx.x,
         blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, text);
  }

  static Runner& instance() {
    static Runner* runner = new Runner;  // fibers may not be torn down while a thread still runs
    return *runner;
  }

 private:
  static void entry() {
    Runner& runner = instance();
    runner.arrived();
    for (;;) {
      acquire(runner.block_->start);
      runner.body_(runner.context_);
      runner.wait(State::kExited, {"exit", "", 0});
    }
  }

  Fiber& fiber_of(int i) { return *(*seat_)[static_cast<size_t>(i)]; }

  Fiber& prepare(int i) {
    if (seat_->size() == static_cast<size_t>(i)) {
      seat_->push_back(std::make_unique<Fiber>());
      seat_->back()->context.start(seat_->back()->stack, kStack, &Runner::entry);
      if (__tsan_create_fiber) seat_->back()->tsan = __tsan_create_fiber(0);
    }
    Fiber& fiber = fiber_of(i);  // one that has run waits in its loop
    const unsigned linear = static_cast<unsigned>(i);
    fiber.linear = i;
    fiber.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
    fiber.state = State::kReady;
    return fiber;
  }

  // From the allocator that the sanitizers watch, full of garbage; by hand, see SharedMemory::fill.
  void make_dynamic_shared() {
    shared_.emplace_back(static_cast<char*>(std::malloc(shared_bytes_)), std::free);
    volatile char* bytes = shared_.back().get();
    for (size_t i = 0; i < shared_bytes_; ++i) bytes[i] = static_cast<char>(0xff);
  }

  void run_block(Order& order) {
    SharedMemory().fill();
    make_dynamic_shared();
    if (__tsan_get_current_fiber) host_tsan_ = __tsan_get_current_fiber();
    std::vector<Fiber*> turns;
    for (int i = 0; i < threads_; ++i) turns.push_back(&prepare(i));
    block_ = std::make_unique<Block>(threads_);
    release(block_->start);
    if (!order.is_random()) order.arrange(turns);
    for (int left = threads_; left > 0;) {
      if (order.is_random()) order.arrange(turns);
      bool progress = false;
      for (Fiber* fiber : turns) {
        if (fiber->state != State::kReady) continue;
        progress = true;
        switch_to(fiber);
        if (fiber->state == State::kExited) --left;
        if (fiber->state == State::kAtWarp) complete_warp(*fiber);
        if (fiber->state == State::kAtBarrier && ++block_->at_barrier == threads_) complete_barrier();
      }
      if (!progress) fail_divergent();
    }
  }

  void complete_barrier() {
    const Site& first = fiber_of(0).site;
    for (int i = 0; i < threads_; ++i) {
      const Site& site = fiber_of(i).site;
      if (site.line != first.line || std::strcmp(site.file, first.file) != 0) fail_divergent();
    }
    unsigned any = 0;
    for (int i = 0; i < threads_; ++i) any |= fiber_of(i).value != 0;
    for (int i = 0; i < threads_; ++i) {
      fiber_of(i).ballot = any;
      fiber_of(i).state = State::kReady;
    }
    block_->at_barrier = 0;
    ++block_->phase;
  }

  void complete_warp(const Fiber& last) {
    const int first = last.linear / kWarp * kWarp;
    Warp& warp = block_->warps[static_cast<size_t>(first / kWarp)];
    warp.waiting |= 1u << (last.linear - first);
    if ((warp.waiting & last.mask) != last.mask) return;
    unsigned ballot = 0;
    for (unsigned lanes = last.mask; lanes; lanes &= lanes - 1) {
      const int lane_index = __builtin_ctz(lanes);
      const Fiber& fiber = lane_of(first, lane_index);
      if (fiber.mask != last.mask || fiber.site.line != last.site.line ||
          std::strcmp(fiber.site.what, last.site.what) != 0 || std::strcmp(fiber.site.file, last.site.file) != 0)
        fail_divergent();
      if (fiber.value) ballot |= 1u << lane_index;
    }
    for (unsigned lanes = last.mask; lanes; lanes &= lanes - 1) {
      Fiber& fiber = lane_of(first, __builtin_ctz(lanes));
      if (!(last.mask >> fiber.source & 1))
        fail("%s in %s:%d reads from lane %d, which its mask 0x%08x leaves out", fiber.site.what, fiber.site.file,
             fiber.site.line, fiber.source, last.mask);
      fiber.result = lane_of(first, fiber.source).value;
      fiber.ballot = ballot;
      fiber.state = State::kReady;
    }
    warp.waiting &= ~last.mask;
    ++warp.phase;
  }

  Fiber& lane_of(int first, int lane_index) { return fiber_of(first + lane_index); }

  // Nobody can go on: say who waits where.
  [[noreturn]] void fail_divergent() {
    std::map<std::tuple<std::string, std::string, int, unsigned>, std::vector<int>> groups;
    for (int i = 0; i < threads_; ++i) {
      const Fiber& fiber = fiber_of(i);
      const bool exited = fiber.state == State::kExited;
      groups[{exited ? "exit" : fiber.site.what, exited ? "" : fiber.site.file, exited ? 0 : fiber.site.line,
              fiber.state == State::kAtWarp ? fiber.mask : 0u}]
          .push_back(i);
    }
    std::string text = "divergent barrier or warp operation in block (" + std::to_string(blockIdx.x) + ", " +
                       std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "):";
    for (const auto& [where, who] : groups) {
      const auto& [what, file, line, mask] = where;
      text += "\n  " + std::to_string(who.size()) + " of " + std::to_string(threads_) + " threads (the first is " +
              std::to_string(who[0]) + ") ";
      if (what == "exit") {
        text += "have left the kernel";
        continue;
      }
      text += "wait at " + what + " in " + file + ":" + std::to_string(line);
      if (mask) {
        char mask_text[32];
        std::snprintf(mask_text, sizeof(mask_text), " with mask 0x%08x", mask);
        text += mask_text;
      }
    }
    fail("%s", text.c_str());
  }

  // From the host to a thread, or from a thread to the host (nullptr).
  void switch_to(Fiber* fiber) {
    Fiber* from = current_;
    current_ = fiber;
    if (fiber) threadIdx = fiber->index;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber ? fiber->tsan : host_tsan_, kNoSync);
    if (__sanitizer_start_switch_fiber) {
      __sanitizer_start_switch_fiber(from ? &from->fake_stack : &host_fake_stack_, fiber ? fiber->stack : host_stack_,
                                     fiber ? kStack : host_stack_size_);
    }
    Context::swap(from ? from->context : host_, fiber ? fiber->context : host_);
    arrived();
  }

  void arrived() {
    if (!__sanitizer_finish_switch_fiber) return;
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(current_ ? current_->fake_stack : host_fake_stack_, &bottom, &size);
    if (current_) {
      host_stack_ = bottom;
      host_stack_size_ = size;
    }
  }

  using Seat = std::vector<std::unique_ptr<Fiber>>;

  Seat seats_[kSeats];
  Seat* seat_ = &seats_[0];
  std::unique_ptr<Block> block_;
  Fiber* current_ = nullptr;
  int threads_ = 0;
  size_t shared_bytes_ = 0;
  std::vector<std::unique_ptr<char, void (*)(void*)>>
      shared_;  // of all blocks: given up when nobody can use it any more
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  Context host_;
  void* host_tsan_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_size_ = 0;
  SyncPoint grid_done_;
};

SyncPoint fence_point;
std::mutex one_kernel_at_a_time;
cudaError_t error_of_last_call = cudaSuccess;
int (*recorder)(const Launch*) = nullptr;

}  // namespace

// Hands every launch to the callback, whose result says whether the kernel shall run here as well; null ends it.
extern "C" __attribute__((visibility("default"))) void riskmap_cuda_on_host_record(int (*callback)(const Launch*)) {
  recorder = callback;
}

bool record(const Launch& launch) { return !recorder || recorder(&launch) != 0; }

cudaError_t& last_error() { return error_of_last_call; }

bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* context) {
  const bool fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                    grid.z <= 65535 && block.x >= 1 && block.x <= kMaxThreads && block.y >= 1 &&
                    block.y <= kMaxThreads && block.z >= 1 && block.z <= 64 &&
                    block.x * block.y * block.z <= kMaxThreads && shared_bytes <= kMaxShared;
  if (!fits) return false;
  const std::lock_guard<std::mutex> lock(one_kernel_at_a_time);
  Runner::instance().run(grid, block, shared_bytes, body, context);
  return true;
}

char* dynamic_shared() { return Runner::instance().shared(); }

int lane() { return Runner::instance().current().linear % kWarp; }

void block_barrier(Site site) { Runner::instance().barrier(site); }

bool block_any(bool value, Site site) {
  Runner::instance().current().value = value;
  Runner::instance().barrier(site);
  return Runner::instance().current().ballot != 0;
}

void warp_barrier(unsigned mask, Site site) {
  Fiber& fiber = Runner::instance().current();
  fiber.source = fiber.linear % kWarp;
  Runner::instance().warp(mask, site, true);
}

uint64_t warp_exchange(unsigned mask, uint64_t value, int source, Site site) {
  Fiber& fiber = Runner::instance().current();
  fiber.value = value;
  fiber.source = source;
  Runner::instance().warp(mask, site, false);
  return fiber.result;
}

unsigned warp_ballot(unsigned mask, bool predicate, Site site) {
  Fiber& fiber = Runner::instance().current();
  fiber.value = predicate;
  fiber.source = fiber.linear % kWarp;
  Runner::instance().warp(mask, site, false);
  return fiber.ballot;
}

void fence() {
  acquire(fence_point);
  release(fence_point);
}

}  // namespace riskmap::cuda_on_host
