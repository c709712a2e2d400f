// Written by `make export` from nbs/kernels/03_emulation.ipynb; edit that.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static            // blocks run one after the other, so one copy serves them all
#define __launch_bounds__(...)

struct dim3 { unsigned x = 1, y = 1, z = 1; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum Wait { RUNS, AT_BLOCK, AT_WARP, ENDED };
struct Thread { unsigned rank = 0; Wait wait = RUNS; ucontext_t* where = nullptr; bool odd = false; };
struct Worker { ucontext_t context; std::vector<char> stack = std::vector<char>(256 * 1024); };

static ucontext_t scheduler;
static std::vector<Thread> threads;
static std::vector<unsigned> order;                     // in which the threads of a block start
static size_t started;
static Thread* current;
static Worker* active;
static std::vector<std::unique_ptr<Worker>> idle, busy;
static void (*body)();
static uint32_t lanes[2][32][32];                       // what the lanes of a warp show each other, twice: see exchange

inline void enter(Thread& thread) { current = &thread; threadIdx.x = thread.rank; }

inline void work() {
    for (;;) {
        while (started < order.size()) {
            enter(threads[order[started++]]);
            body();
            current->wait = ENDED;
        }
        swapcontext(&active->context, &scheduler);
    }
}

inline void wait_at(Wait place) {
    Thread* me = current;
    Worker* mine = active;
    me->wait = place;
    me->where = &mine->context;
    swapcontext(&mine->context, &scheduler);
    active = mine;
}

inline void start_threads() {
    for (started = 0; started < threads.size();) {
        if (idle.empty()) {
            idle.push_back(std::make_unique<Worker>());
            ucontext_t& context = idle.back()->context;
            getcontext(&context);
            context.uc_stack.ss_sp = idle.back()->stack.data();
            context.uc_stack.ss_size = idle.back()->stack.size();
            context.uc_link = &scheduler;
            makecontext(&context, work, 0);
        }
        busy.push_back(std::move(idle.back()));
        idle.pop_back();
        active = busy.back().get();
        swapcontext(&scheduler, &active->context);
    }
}

inline bool all_wait(Wait place, unsigned first, unsigned end) {
    for (unsigned rank = first; rank < end; ++rank)
        if (threads[rank].wait != place && threads[rank].wait != ENDED) return false;
    return true;
}

// Runs one block; false if it cannot end.
inline bool run_block() {
    unsigned count = threads.size();
    for (auto& thread : threads) thread = Thread{thread.rank};
    start_threads();
    for (bool moved = true; moved;) {
        moved = false;
        std::vector<unsigned> ready;
        if (all_wait(AT_BLOCK, 0, count)) ready = order;
        else for (unsigned rank : order)
            if (threads[rank].wait == AT_WARP && all_wait(AT_WARP, rank / 32 * 32, std::min(rank / 32 * 32 + 32, count)))
                ready.push_back(rank);
        for (unsigned rank : ready) {
            Thread& thread = threads[rank];
            if (thread.wait == ENDED) continue;
            moved = true;
            thread.wait = RUNS;
            enter(thread);
            swapcontext(&scheduler, thread.where);
        }
    }
    bool ended = all_wait(ENDED, 0, count);
    if (ended) while (!busy.empty()) { idle.push_back(std::move(busy.back())); busy.pop_back(); }
    else busy.clear();
    return ended;
}

// What lane `source` of this thread's warp holds. Two buffers in turn: a fast lane may already be at its next exchange.
template <class T> T exchange(T value, unsigned source) {
    static_assert(sizeof(T) == 4, "lanes exchange 32 bits");
    uint32_t* shown = lanes[current->odd][current->rank / 32];
    current->odd = !current->odd;
    std::memcpy(shown + current->rank % 32, &value, 4);
    wait_at(AT_WARP);
    if (source < 32) std::memcpy(&value, shown + source, 4);
    return value;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

static void** launched;
template <auto kernel, class... A> void thread_body(void (*)(A...)) {
    call(kernel, launched, std::index_sequence_for<A...>{});
}

// Runs a whole grid. `turn`: 0 starts the threads in order, 1 in reverse, 2 interleaved.
template <auto kernel> int launch(unsigned grid, unsigned block, void** arguments, int turn) {
    launched = arguments;
    body = [] { thread_body<kernel>(kernel); };
    gridDim.x = grid;
    blockDim.x = block;
    threads.assign(block, Thread{});
    order.resize(block);
    for (unsigned i = 0; i < block; ++i) {
        threads[i].rank = i;
        order[i] = turn == 0 ? i : turn == 1 ? block - 1 - i : (i * 37 + 3) % block;
    }
    for (unsigned i = 0; i < grid; ++i) {
        blockIdx.x = turn == 1 ? grid - 1 - i : i;
        if (!run_block()) return 1;
    }
    return 0;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_at(emulation::AT_BLOCK); }
template <class T> T __shfl_down_sync(unsigned, T value, int step) {
    return emulation::exchange(value, emulation::current->rank % 32 + step);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchange(value, (emulation::current->rank % 32) ^ mask);
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return emulation::exchange(value, lane); }
template <class T> T atomicAdd(T* target, T value) { T old = *target; *target += value; return old; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
