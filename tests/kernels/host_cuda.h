// Enough of CUDA to compile the kernels as C++ and run them on a CPU, one thread after another.
//
// Blocks run one by one. A block's threads are coroutines: each runs until a barrier, where it
// waits for its warp or its block. A barrier that some thread of the warp or block never reaches,
// because it returned or waits elsewhere, ends the launch: on a GPU that is undefined.

// Some distributions' compilers check each longjmp, and take one from stack to stack for an attack.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __noinline__
#define __launch_bounds__(...)
#define EXPORTED extern "C" __attribute__((visibility("default")))

using std::exp;
using std::fmax;
using std::log;
using std::sqrt;

struct Dim {
    unsigned x, y;
};
static Dim threadIdx, blockIdx, blockDim;

namespace host {
enum State { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, DONE };
struct Thread {
    jmp_buf place;  // where it waits; unlike swapcontext, this asks nothing of the system
    std::unique_ptr<char[]> stack;
    State state;
};
static std::vector<Thread> threads;  // each serves one block after the other
static jmp_buf scheduler;
static unsigned current;
static std::function<void()> body;
static unsigned long long exchanged[1024];
static const unsigned STACK = 1 << 16;  // memory that is not touched costs nothing

static void wait(State state) {
    threads[current].state = state;
    if (_setjmp(threads[current].place) == 0) _longjmp(scheduler, 1);
}

static void serve() {
    for (wait(DONE);; wait(DONE)) body();
}

static void make_thread(Thread& thread) {
    ucontext_t context;
    getcontext(&context);
    thread.stack.reset(new char[STACK]);
    context.uc_stack.ss_sp = thread.stack.get();
    context.uc_stack.ss_size = STACK;
    makecontext(&context, serve, 0);
    if (_setjmp(scheduler) == 0) setcontext(&context);
}

static void go_on(unsigned i) {
    current = i;
    threadIdx = {i % blockDim.x, i / blockDim.x};
    if (_setjmp(scheduler) == 0) _longjmp(threads[i].place, 1);
}

// Let a group of threads go on if all of them wait for it; true if they do.
static bool release(unsigned first, unsigned last, State state) {
    for (unsigned i = first; i < last; ++i)
        if (threads[i].state != state) return false;
    for (unsigned i = first; i < last; ++i) threads[i].state = RUNS;
    return true;
}

// The first thread of the block that waits for ever, or -1.
static int run_block(unsigned size) {
    for (unsigned i = 0; i < size; ++i) threads[i].state = RUNS;
    // A warp runs as far as it can before the next one moves, in one order or the other: that shows
    // most of the places where a barrier is missing between warps.
    const unsigned n_warps = size / 32;
    do {
        for (unsigned w = 0; w < n_warps; ++w) {
            const unsigned first = 32 * (blockIdx.x % 2 ? n_warps - 1 - w : w);
            do {
                for (unsigned i = first; i < first + 32; ++i)
                    if (threads[i].state == RUNS) go_on(i);
            } while (release(first, first + 32, WAITS_FOR_WARP));
        }
    } while (release(0, size, WAITS_FOR_BLOCK));
    for (unsigned i = 0; i < size; ++i)
        if (threads[i].state != DONE) return int(i);
    return -1;
}

// What went wrong, or null.
static const char* launch(const unsigned* grid, const unsigned* block,
                          std::function<void()> kernel) {
    static char words[100];
    const unsigned size = block[0] * block[1];
    blockDim = {block[0], block[1]};
    body = kernel;
    threads.reserve(1024);
    for (current = threads.size(); current < size; ++current) {
        threads.emplace_back();
        make_thread(threads[current]);
    }
    for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) {
            const int stuck = run_block(size);
            if (stuck < 0) continue;
            threads.clear();
            std::snprintf(words, sizeof words, "thread %d of block (%u, %u) waits forever", stuck,
                          blockIdx.x, blockIdx.y);
            return words;
        }
    }
    return nullptr;
}
}  // namespace host

static void __syncthreads() { host::wait(host::WAITS_FOR_BLOCK); }
static void __syncwarp() { host::wait(host::WAITS_FOR_WARP); }

template <class T>
static T __shfl_xor_sync(unsigned, T mine, int step) {
    std::memcpy(&host::exchanged[host::current], &mine, sizeof(T));
    __syncwarp();
    T other;
    std::memcpy(&other, &host::exchanged[host::current ^ unsigned(step)], sizeof(T));
    __syncwarp();
    return other;
}

template <class T>
static T __shfl_sync(unsigned, T mine, int lane) {
    return __shfl_xor_sync(0, mine, int(host::current % 32) ^ lane);
}

static unsigned __ballot_sync(unsigned, bool mine) {
    host::exchanged[host::current] = mine;
    __syncwarp();
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        bits |= unsigned(host::exchanged[host::current / 32 * 32 + lane]) << lane;
    __syncwarp();
    return bits;
}

static unsigned __match_any_sync(unsigned, int mine) {
    host::exchanged[host::current] = unsigned(mine);
    __syncwarp();
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned other = unsigned(host::exchanged[host::current / 32 * 32 + lane]);
        bits |= unsigned(other == unsigned(mine)) << lane;
    }
    __syncwarp();
    return bits;
}

static int __popc(unsigned bits) { return __builtin_popcount(bits); }

static int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }

static double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
static T atomicAdd(T* sum, T value) {
    const T before = *sum;
    *sum += value;
    return before;
}

// Whether the coroutines work on this machine: 0 if they do.
EXPORTED int try_coroutines() {
    static unsigned sum;
    const unsigned grid[] = {2, 1}, block[] = {32, 2};
    sum = 0;
    const char* wrong = host::launch(grid, block, [] {
        const unsigned other = __shfl_xor_sync(~0u, threadIdx.x, 1);
        __syncthreads();
        sum += other;
    });
    return wrong || sum != 4 * 496;
}
