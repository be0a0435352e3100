// What all kernels share: the number type, rows and their reductions, samples grouped by label.
//
// Index letters as in the NumPy twin: t sample, i true class, j observed class, d feature; s is a
// place among the links of a row. Offsets have 64 bits.

typedef REAL real;  // float or double, chosen when the source is compiled
typedef long long int64;

// Kernels that may be launched with blocks of 1024 threads: at most 64 registers for each.
#define WIDE __launch_bounds__(1024, 1)

const unsigned ALL_LANES = 0xffffffffu;

__device__ inline real minus_infinity() { return real(__longlong_as_double(0xfff0000000000000LL)); }
__device__ inline real not_a_number() { return real(__longlong_as_double(0x7ff8000000000000LL)); }

// x / y. CuPy compiles with -ftz=true, after our options: float32 numbers below 1.2e-38 become zero.
// That is harmless before the division by the number of samples, but after it, it would be more
// than rounding explains. This instruction keeps them, whatever the option.
__device__ inline float quotient(float x, float y) {
#ifdef __CUDA_ARCH__
    float q;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(q) : "f"(x), "f"(y));
    return q;
#else
    return x / y;
#endif
}
__device__ inline double quotient(double x, double y) { return x / y; }

// x * y, with the numbers below 1.2e-38 kept as above: by 1 / n, a product for each number of a row
// rather than a division, for one rounding more.
__device__ inline float product(float x, float y) {
#ifdef __CUDA_ARCH__
    float p;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(p) : "f"(x), "f"(y));
    return p;
#else
    return x * y;
#endif
}
__device__ inline double product(double x, double y) { return x * y; }

// A row belongs to blockDim.x threads: to one warp (then a block holds blockDim.y rows, which know
// nothing of each other) or to a whole block (then blockDim.y is 1). Either way a row beyond the
// end may return at once: all threads that it would wait for return with it.
__device__ inline int64 my_row() { return int64(blockIdx.x) * blockDim.y + threadIdx.y; }

__device__ inline void wait_for_row() {
    if (blockDim.x == 32) __syncwarp();
    else __syncthreads();
}

// The sum of exp(x) over some numbers x, as exp(top) * sum, where top is the largest of them.
struct LogSum {
    real top;
    real sum;

    // Online log-sum-exp: a new largest number rescales what is there. NaN ends up in sum.
    __device__ void add(real x) {
        if (x > top) {
            sum = sum * exp(top - x) + 1;
            top = x;
        } else if (x != minus_infinity()) {
            sum += exp(x - top);
        }
    }

    // The same for several numbers: the exponentials do not wait for one another. -inf adds nothing.
    template <int SIZE>
    __device__ void add_all(const real (&x)[SIZE]) {
        real new_top = top;
#pragma unroll
        for (int m = 0; m < SIZE; ++m) new_top = x[m] > new_top ? x[m] : new_top;
        const real shift = new_top == minus_infinity() ? real(0) : new_top;  // not -inf - (-inf)
        sum *= exp(top - shift);
        top = new_top;
#pragma unroll
        for (int m = 0; m < SIZE; ++m) sum += exp(x[m] - shift);
    }

    __device__ real log_of_all() const { return top + log(sum); }  // -inf if all were
};

__device__ inline LogSum nothing_yet() {
    LogSum none = {minus_infinity(), real(0)};
    return none;
}

// Symmetric to the last bit, so that all lanes of an exchange agree.
__device__ inline LogSum joined(LogSum a, LogSum b) {
    if (b.top > a.top) {
        const LogSum larger = b;
        b = a;
        a = larger;
    }
    // Without this, two sums of nothing would meet in exp(-inf + inf).
    const real scale = b.top == minus_infinity() ? real(1) : exp(b.top - a.top);
    a.sum += b.sum * scale;
    return a;
}

__device__ inline LogSum warp_log_sum(LogSum mine) {
    for (int step = 16; step > 0; step /= 2) {
        LogSum other;
        other.top = __shfl_xor_sync(ALL_LANES, mine.top, step);
        other.sum = __shfl_xor_sync(ALL_LANES, mine.sum, step);
        mine = joined(mine, other);
    }
    return mine;
}

template <class T>
__device__ inline T warp_sum(T mine) {
    for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(ALL_LANES, mine, step);
    return mine;
}

// Every thread of the row gets the sum over the row, the same bits in each and in every run.
__device__ inline LogSum row_log_sum(LogSum mine) {
    mine = warp_log_sum(mine);
    if (blockDim.x == 32) return mine;
    __shared__ real top_of_warp[32], sum_of_warp[32];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // somebody may still be reading what the last reduction left
    if (lane == 0) {
        top_of_warp[warp] = mine.top;
        sum_of_warp[warp] = mine.sum;
    }
    __syncthreads();
    mine = nothing_yet();
    if (lane < blockDim.x / 32) {
        mine.top = top_of_warp[lane];
        mine.sum = sum_of_warp[lane];
    }
    return warp_log_sum(mine);
}

template <class T>
__device__ inline T row_sum(T mine) {
    mine = warp_sum(mine);
    if (blockDim.x == 32) return mine;
    __shared__ T sum_of_warp[32];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) sum_of_warp[warp] = mine;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? sum_of_warp[lane] : T(0));
}

// top and log(sum) of a row of scores: log softmax_i = (score_i - top) - log_sum (Eqs. 7, 10).
__device__ inline LogSum row_log_softmax(const real* scores, int64 length) {
    LogSum mine = nothing_yet();
#pragma unroll 4
    for (int64 i = threadIdx.x; i < length; i += blockDim.x) mine.add(scores[i]);
    return row_log_sum(mine);
}

// Rows in registers. A row of up to blockDim.x * VALUES numbers is read once: each thread holds VALUES
// of them, in packs of 16 bytes. VALUES, the threads of a block and the blocks that each
// multiprocessor is to hold at a time are chosen when the source is compiled.
#ifndef VALUES
#define VALUES 4
#define THREADS 128
#define RESIDENT 1
#endif
#define HELD __launch_bounds__(THREADS, RESIDENT)

const int PACK = 16 / sizeof(real);
struct alignas(16) Pack {
    real of[PACK];
};

// The class of a thread's value v.
__device__ inline int class_of(int v) {
    return (v / PACK * int(blockDim.x) + int(threadIdx.x)) * PACK + v % PACK;
}

__device__ inline bool in_packs(const real* row, int k) {
    return k % PACK == 0 && reinterpret_cast<unsigned long long>(row) % sizeof(Pack) == 0;
}

// Beyond the end of the row there is `beyond`.
__device__ inline void load_row(const real* row, int k, real beyond, real (&value)[VALUES]) {
    if (in_packs(row, k)) {
#pragma unroll
        for (int v = 0; v < VALUES; v += PACK) {
            Pack pack;
#pragma unroll
            for (int p = 0; p < PACK; ++p) pack.of[p] = beyond;
            if (class_of(v) < k) pack = *reinterpret_cast<const Pack*>(row + class_of(v));
#pragma unroll
            for (int p = 0; p < PACK; ++p) value[v + p] = pack.of[p];
        }
    } else {
#pragma unroll
        for (int v = 0; v < VALUES; ++v)
            value[v] = class_of(v) < k ? row[class_of(v)] : beyond;
    }
}

template <class T>
__device__ inline void store_row(const T (&value)[VALUES], real* row, int k) {
    if (in_packs(row, k)) {
#pragma unroll
        for (int v = 0; v < VALUES; v += PACK) {
            Pack pack;
#pragma unroll
            for (int p = 0; p < PACK; ++p) pack.of[p] = real(value[v + p]);
            if (class_of(v) < k) *reinterpret_cast<Pack*>(row + class_of(v)) = pack;
        }
    } else {
#pragma unroll
        for (int v = 0; v < VALUES; ++v)
            if (class_of(v) < k) row[class_of(v)] = real(value[v]);
    }
}

__device__ inline void fill_row(real number, real* row, int k) {
    for (int i = threadIdx.x; i < k; i += blockDim.x) row[i] = number;
}

// Have the row brought to the second-level cache while there is something else to do.
__device__ inline void prefetch_row(const real* row, int k) {
#ifdef __CUDA_ARCH__
    const int line = 128 / sizeof(real);
    for (int i = threadIdx.x * line; i < k; i += blockDim.x * line)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
#endif
}

// The row's largest number, and beside it the sum of something else: one exchange for both.
__device__ inline void row_max_and_sum(real& largest, real& sum) {
    for (int step = 16; step > 0; step /= 2) {
        largest = fmax(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    }
    if (blockDim.x == 32) return;
    __shared__ real max_of_warp[32], sum_of_warp[32];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) {
        max_of_warp[warp] = largest;
        sum_of_warp[warp] = sum;
    }
    __syncthreads();
    largest = lane < blockDim.x / 32 ? max_of_warp[lane] : minus_infinity();
    sum = lane < blockDim.x / 32 ? sum_of_warp[lane] : real(0);
    for (int step = 16; step > 0; step /= 2) {
        largest = fmax(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    }
}

__device__ inline real row_max(const real (&value)[VALUES]) {
    real largest = minus_infinity(), nothing = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) largest = fmax(largest, value[v]);
    row_max_and_sum(largest, nothing);
    return largest;
}

// Samples sorted by label: those of label j stand in order from group_begin(j) to group_begin(j+1).
// ends_jb[j, b] says where, in that order, the samples of label j from chunk b of the data end. Those
// whose label is out of range come last, as label k.
__device__ inline int64 group_begin(const int64* ends_jb, int64 n_chunks, int64 j) {
    return j == 0 ? 0 : ends_jb[j * n_chunks - 1];
}

__device__ inline bool is_class(int64 label, int64 k) { return label >= 0 && label < k; }

// a / b for numbers that are not negative: in 32 bits, many times faster, where these suffice.
__device__ inline int64 divided(int64 a, int64 b) {
    return (a | b) >> 32 == 0 ? int64(unsigned(a) / unsigned(b)) : a / b;
}
