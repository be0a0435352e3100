// What all kernels share: the number type, rows and their reductions, samples grouped by label.
//
// Index letters as in the NumPy twin: t sample, i true class, j observed class, d feature; s is a
// place among the links of a row. Offsets have 64 bits.

typedef REAL real;  // float or double, chosen when the source is compiled
typedef long long int64;

// Kernels that may be launched with blocks of 1024 threads: at most 64 registers for each.
#define WIDE __launch_bounds__(1024, 1)

const unsigned ALL_LANES = 0xffffffffu;

// What a thread loads or stores at once.
const int PACK_BYTES = 16, PACK = PACK_BYTES / int(sizeof(real));
struct alignas(PACK_BYTES) Pack {
    real of[PACK];
};

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

// Have a row brought to the second-level cache while there is something else to do: its pieces of 128
// bytes, by so many threads.
__device__ inline void prefetch_row(const real* row, int length, int thread, int n_threads) {
#ifdef __CUDA_ARCH__
    const int line = 128 / sizeof(real);
    for (int i = thread * line; i < length; i += n_threads * line)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
#endif
}

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

// top and log(sum) of a row of scores: log softmax_i = (score_i - top) - log_sum (Eqs. 7, 10). A
// thread loads several numbers before it needs the first of them.
__device__ inline LogSum row_log_softmax(const real* scores, int64 length) {
    LogSum mine = nothing_yet();
    for (int64 first = threadIdx.x; first < length; first += 4 * blockDim.x) {
        real x[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const int64 i = first + m * blockDim.x;
            x[m] = i < length ? scores[i] : minus_infinity();
        }
        mine.add_all(x);
    }
    return row_log_sum(mine);
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

// The samples in the order of their labels are cut into units of per_unit samples. The c_ti of a
// unit's samples of one label are added to a row of a table of counts: row unit + label, for both of
// these only grow along the order, or by_place the row that is the place of the first of them.
__device__ inline int64 counts_row(int64 unit, int64 label, int64 place, int64 by_place) {
    return by_place ? place : unit + label;
}
