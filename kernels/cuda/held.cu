// Rows in registers: softmax.cu's and s_model.cu's work on rows that are read once. A row has up to
// ROW_THREADS * VALUES numbers; each thread holds VALUES of them, in packs of 16 bytes. VALUES,
// ROW_THREADS (blockDim.x), the THREADS of a block and how many blocks are to be RESIDENT on a
// multiprocessor are chosen when the source is compiled.

#define HELD __launch_bounds__(THREADS, RESIDENT)

// The class of a thread's value v: a number known to the compiler beyond that of its first value, so
// that addresses need no arithmetic of their own.
__device__ inline int first_class() { return int(threadIdx.x) * PACK; }
__device__ constexpr int classes_beyond(int v) { return v / PACK * ROW_THREADS * PACK + v % PACK; }
__device__ inline int class_of(int v) { return first_class() + classes_beyond(v); }

__device__ inline bool in_packs(const real* row, int k) {
    return k % PACK == 0 && reinterpret_cast<unsigned long long>(row) % sizeof(Pack) == 0;
}

// Begin to copy BYTES to shared memory, without a register in between. The thread's own copies are
// there after wait_for_copies, to itself; one that copies only what it reads waits for no other.
template <int BYTES>
__device__ inline void begin_copy(void* to_shared, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned to = unsigned(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES)
                 : "memory");
#else
    struct alignas(BYTES) Bytes {
        char of[BYTES];
    };
    *static_cast<Bytes*>(to_shared) = *static_cast<const Bytes*>(from);
#endif
}

__device__ inline void end_of_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until no more than so many groups of copies, the last ones begun, are on their way.
template <int GROUPS>
__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// Begin to copy a row, each thread the packs of its own values; nothing is written beyond the end.
__device__ inline void begin_row(const real* row, int k, Pack* packs) {
    const real* const own = row + first_class();
    if (in_packs(row, k)) {
#pragma unroll
        for (int v = 0; v < VALUES; v += PACK)
            if (class_of(v) < k)
                begin_copy<sizeof(Pack)>(&packs[v / PACK * ROW_THREADS], own + classes_beyond(v));
    } else {
#pragma unroll
        for (int v = 0; v < VALUES; ++v)
            if (class_of(v) < k)
                begin_copy<sizeof(real)>(&packs[v / PACK * ROW_THREADS].of[v % PACK],
                                         own + classes_beyond(v));
    }
}

// A thread's values of a row. Beyond the end of the row there is `beyond`.
__device__ inline void load_row(const real* row, int k, real beyond, real (&value)[VALUES]) {
    const real* const own = row + first_class();
    if (in_packs(row, k)) {
#pragma unroll
        for (int v = 0; v < VALUES; v += PACK) {
            Pack pack;
#pragma unroll
            for (int p = 0; p < PACK; ++p) pack.of[p] = beyond;
            if (class_of(v) < k) pack = *reinterpret_cast<const Pack*>(own + classes_beyond(v));
#pragma unroll
            for (int p = 0; p < PACK; ++p) value[v + p] = pack.of[p];
        }
    } else {
#pragma unroll
        for (int v = 0; v < VALUES; ++v)
            value[v] = class_of(v) < k ? own[classes_beyond(v)] : beyond;
    }
}

template <class T>
__device__ inline void store_row(const T (&value)[VALUES], real* row, int k) {
    real* const own = row + first_class();
    if (in_packs(row, k)) {
#pragma unroll
        for (int v = 0; v < VALUES; v += PACK) {
            Pack pack;
#pragma unroll
            for (int p = 0; p < PACK; ++p) pack.of[p] = real(value[v + p]);
            if (class_of(v) < k) *reinterpret_cast<Pack*>(own + classes_beyond(v)) = pack;
        }
    } else {
#pragma unroll
        for (int v = 0; v < VALUES; ++v)
            if (class_of(v) < k) own[classes_beyond(v)] = real(value[v]);
    }
}

__device__ inline void fill_row(real number, real* row, int k) {
    for (int i = threadIdx.x; i < k; i += blockDim.x) row[i] = number;
}

// The row's largest number, and beside it the sum of something else: one exchange for both.
__device__ inline void row_max_and_sum(real& largest, real& sum) {
    for (int step = 16; step > 0; step /= 2) {
        largest = fmax(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    }
    if (ROW_THREADS == 32) return;
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

__device__ inline real warp_max(real mine) {
    for (int step = 16; step > 0; step /= 2)
        mine = fmax(mine, __shfl_xor_sync(ALL_LANES, mine, step));
    return mine;
}

// row_sum, without the shared memory that only rows of many threads need.
template <class T>
__device__ inline T sum_of_row(T mine) {
    if constexpr (ROW_THREADS == 32) return warp_sum(mine);
    else return row_sum(mine);
}

__device__ inline real row_max(const real (&value)[VALUES]) {
    real largest = minus_infinity(), nothing = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) largest = fmax(largest, value[v]);
    row_max_and_sum(largest, nothing);
    return largest;
}

// softmax_nll_rows and soft_target_nll_rows. q_ti = exp(a_ti - top_t) / sum_t; the padding is -inf.
extern "C" __global__ void HELD softmax_nll_held(
    const real* logits, const int64* labels, int64 n, int64 k, real* log_q_z_t, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    real a[VALUES];
    load_row(logits + t * k, k, minus_infinity(), a);
    const int64 z = labels[t];
    const real a_z = is_class(z, k) ? logits[t * k + z] : not_a_number();
    const real top = row_max(a);
    real sum = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) sum += a[v] = exp(a[v] - top);
    sum = row_sum(sum);
    const real per_sum = 1 / sum, per_n = 1 / real(n);
    const real spoilt = is_class(z, k) ? real(0) : not_a_number();
#pragma unroll
    for (int v = 0; v < VALUES; ++v)
        a[v] = product((a[v] * per_sum - real(class_of(v) == z)) + spoilt, per_n);
    store_row(a, d_logits + t * k, k);
    if (threadIdx.x == 0) log_q_z_t[t] = (a_z - top) - log(sum);  // Eq. 7
}

extern "C" __global__ void HELD soft_target_nll_held(
    const real* logits, const real* targets, int64 n, int64 k, real* score_t, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    real a[VALUES], c[VALUES];
    load_row(logits + t * k, k, minus_infinity(), a);
    load_row(targets + t * k, k, real(0), c);
    const real top = row_max(a);
    real sum = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) sum += exp(a[v] - top);
    sum = row_sum(sum);
    const real log_sum = log(sum), per_sum = 1 / sum, per_n = 1 / real(n);
    double score = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
        const real shifted = a[v] - top;
        if (c[v] > 0) score += double(c[v] * (shifted - log_sum));
        a[v] = product(exp(shifted) * per_sum - c[v], per_n);
    }
    store_row(a, d_logits + t * k, k);
    score = row_sum(score);
    if (threadIdx.x == 0) score_t[t] = real(score);
}

// A row's numbers q_ti and c_ti (Eqs. 7, 3), and log m_t (Eq. 11), from a_ti and log theta_i,z_t. Each
// softmax has its own largest number in front, so that nothing overflows, nor vanishes that the
// result depends on: a becomes c, and q is as it says. The padding of a is -inf.
__device__ inline real posterior_of_row(real (&a)[VALUES], const real* log_theta, int k,
                                        real (&q)[VALUES]) {
    const real top = row_max(a);
    real sum = 0, joint_top = minus_infinity();
    {
        real log_theta_i[VALUES];
        load_row(log_theta, k, real(0), log_theta_i);
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
            const real shifted = a[v] - top;
            q[v] = exp(shifted);
            sum += q[v];
            a[v] = shifted + log_theta_i[v];
            joint_top = fmax(joint_top, a[v]);
        }
    }
    row_max_and_sum(joint_top, sum);
    real joint_sum = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
        // An unreachable label has log m = -inf, and all of its terms are: c is NaN.
        a[v] = exp(a[v] - joint_top);
        joint_sum += a[v];
    }
    joint_sum = sum_of_row(joint_sum);
    const real per_sum = 1 / sum, per_joint_sum = 1 / joint_sum;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
        q[v] *= per_sum;
        a[v] *= per_joint_sum;
    }
    return joint_top == minus_infinity() ? joint_top
                                         : (joint_top + log(joint_sum)) - log(sum);
}

// posterior_rows, without log_q_parts.
extern "C" __global__ void HELD posterior_rows_held(
    const real* logits, const real* log_theta, int by_label, const int64* labels, int64 n, int64 k,
    real* log_m_t, real* c_ti, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    const int64 z = labels[t];
    if (!is_class(z, k)) {
        if (c_ti) fill_row(not_a_number(), c_ti + t * k, k);
        if (d_logits) fill_row(not_a_number(), d_logits + t * k, k);
        if (threadIdx.x == 0) log_m_t[t] = not_a_number();
        return;
    }
    real a[VALUES], q[VALUES];
    load_row(logits + t * k, k, minus_infinity(), a);
    const real log_m = posterior_of_row(a, log_theta + (by_label ? z : t) * k, k, q);
    if (c_ti) store_row(a, c_ti + t * k, k);
    if (threadIdx.x == 0) log_m_t[t] = log_m;
    if (!d_logits) return;
    const real per_n = 1 / real(n);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) q[v] = product(q[v] - a[v], per_n);
    store_row(q, d_logits + t * k, k);
}

// Numbers from e^-43 to 1, or exactly zero, have products that are in range or exactly zero.
#define FAR real(-43)

// The smaller of the two; -inf and NaN do not count.
__device__ inline real least_finite(real least, real x) { return fmin(least, fma(x, real(0), x)); }

// Write theta_i,z, each thread the packs of its own values, and return whether all of them, but for
// exact zeros, are at least e^-43.
__device__ inline bool take_theta(const real* log_theta, int k, Pack* theta) {
    real log_theta_i[VALUES], least = 0;
    load_row(log_theta, k, minus_infinity(), log_theta_i);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
        least = least_finite(least, log_theta_i[v]);
        log_theta_i[v] = exp(log_theta_i[v]);
    }
#pragma unroll
    for (int v = 0; v < VALUES; v += PACK) {
        Pack pack;
#pragma unroll
        for (int p = 0; p < PACK; ++p) pack.of[p] = log_theta_i[v + p];
        theta[v / PACK * ROW_THREADS] = pack;
    }
    return __ballot_sync(ALL_LANES, least < FAR) == 0;
}

__device__ inline int label_or_minus_one(int64 label, int k) {
    return is_class(label, k) ? int(label) : -1;
}

// The next samples of a warp, 32 at a time, so that it does not wait for an index in front of each
// row: lane l has the number and the label of the l-th of them.
struct Samples {
    unsigned t;
    int z;
};

__device__ inline Samples load_samples(const int64* order, int length, const int64* labels, int k,
                                       int first) {
    const int place = first + int(threadIdx.x % 32);
    const int64 t = order[place < length ? place : length - 1];
    const Samples samples = {unsigned(t), label_or_minus_one(labels[t], k)};
    return samples;
}

// The sample at a place among them, or from 32 on among the later ones.
__device__ inline Samples sample(const Samples& now, const Samples& later, int at) {
    const Samples one = {__shfl_sync(ALL_LANES, at < 32 ? now.t : later.t, at % 32),
                         __shfl_sync(ALL_LANES, at < 32 ? now.z : later.z, at % 32)};
    return one;
}

// A row of the s-model where something might vanish: writes d_logits and c, each thread the packs of
// its own values; returns log m_t. It is rare and has few registers, for those of its caller are full:
// so it reads the row again and again.
__device__ __noinline__ real far_row(const real* logits, const real* log_theta, int k, real per_n,
                                     real* d_logits, Pack* c) {
    real top = minus_infinity(), joint_top = minus_infinity(), sum = 0, joint_sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < k; i += 32) top = fmax(top, logits[i]);
    top = warp_max(top);
#pragma unroll 1
    for (int i = threadIdx.x; i < k; i += 32) {
        sum += exp(logits[i] - top);
        joint_top = fmax(joint_top, (logits[i] - top) + log_theta[i]);
    }
    row_max_and_sum(joint_top, sum);
#pragma unroll 1
    for (int i = threadIdx.x; i < k; i += 32)
        joint_sum += exp(((logits[i] - top) + log_theta[i]) - joint_top);
    joint_sum = warp_sum(joint_sum);
#pragma unroll 1
    for (int v = 0; v < VALUES; ++v) {
        const int i = class_of(v);
        real& c_i = c[v / PACK * ROW_THREADS].of[v % PACK];
        if (i >= k) continue;
        const real shifted = logits[i] - top;
        // An unreachable label has log m = -inf, and all of its terms are: c is NaN.
        c_i = exp((shifted + log_theta[i]) - joint_top) / joint_sum;
        d_logits[i] = product(exp(shifted) / sum - c_i, per_n);
    }
    return joint_top == minus_infinity() ? joint_top
                                         : (joint_top + log(joint_sum)) - log(sum);
}

// Eqs. 3, 7 and 11 in one pass: a unit's samples one after the other by the threads of a row. N_ij is
// added in registers, some samples first and then such sums: in float32 that loses about as much as
// rounding at the end, and to convert each number to float64 would take longer than an exponential.
// log m_t is added in float64.
//
// A row of a warp has theta_i,z beside it, in shared memory, and there the next two rows arrive. Where
// nothing can vanish, the joint probabilities are products of exp(a - top) and theta: one exponential
// for each number, not two.
extern "C" __global__ void HELD s_model_rows(
    const real* logits, const real* log_theta_ji, const int64* labels, const int64* order, int64 n,
    int64 n_classes, int64 per_unit, int64 by_place, real* d_logits, real* counts, double* log_m_u) {
    constexpr bool of_warp = ROW_THREADS == 32;
    constexpr int row_packs = ROW_THREADS * VALUES / PACK;
    __shared__ Pack packs[of_warp ? 3 * (THREADS / ROW_THREADS) * row_packs : 1];
    const int64 unit = my_row(), begin = unit * per_unit;
    if (begin >= n) return;
    const int k = int(n_classes);
    // The thread's packs of a row are ROW_THREADS apart.
    Pack* const theta = packs + (of_warp ? threadIdx.y * 3 * row_packs + threadIdx.x : 0);
    Pack *arrived = theta + row_packs, *arriving = arrived + row_packs;
    const int length = int(begin + per_unit < n ? per_unit : n - begin);
    const real per_n = 1 / real(n);
    double log_m_sum = 0;
    // Of the label: its last samples, and those before them.
    real count[VALUES], count_before[VALUES];
#pragma unroll
    for (int v = 0; v < VALUES; ++v) count[v] = count_before[v] = 0;
    bool is_first = true, theta_near = false;
    int first_place = 0;  // of its label, in the unit
    int together = 8;     // samples, a power of two: there are about as many such sums
    while (int64(together) * together < per_unit) together *= 2;
    order += begin;
    Samples now = load_samples(order, length, labels, k, 0);
    Samples later = load_samples(order, length, labels, k, 32);
    if constexpr (of_warp) {
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
            if (class_of(v) < k) continue;
            arrived[v / PACK * ROW_THREADS].of[v % PACK] = minus_infinity();
            arriving[v / PACK * ROW_THREADS].of[v % PACK] = minus_infinity();
        }
        begin_row(logits + order[0] * k, k, arrived);  // not waiting for labels
        end_of_copies();
        if (length > 1) begin_row(logits + order[1] * k, k, arriving);
        end_of_copies();
    }
    Samples own = sample(now, later, 0), next = sample(now, later, 1);
    for (int place = 0; place < length; ++place) {
        if (place % 32 == 0 && place) {
            now = later;
            if (place + 32 < length) later = load_samples(order, length, labels, k, place + 32);
        }
        const int64 t = own.t;
        const int z = own.z;
        own = next;
        next = sample(now, later, place % 32 + 2);
        if (own.z != z && own.z >= 0)
            prefetch_row(log_theta_ji + int64(own.z) * k, k, threadIdx.x, blockDim.x);
        if (z < 0) {  // as will all that follow be: they come last in the order
            log_m_sum = not_a_number();
            fill_row(not_a_number(), d_logits + t * k, k);
            continue;
        }
        const real* const log_theta = log_theta_ji + int64(z) * k;
        if (of_warp && is_first) theta_near = take_theta(log_theta, k, theta);
        real a[VALUES];
        if constexpr (of_warp) {
            wait_for_copies<1>();
#pragma unroll
            for (int v = 0; v < VALUES; v += PACK) {
                const Pack pack = arrived[v / PACK * ROW_THREADS];
#pragma unroll
                for (int p = 0; p < PACK; ++p) a[v + p] = pack.of[p];
            }
        } else {
            load_row(logits + t * k, k, minus_infinity(), a);
            prefetch_row(logits + int64(own.t) * k, k, threadIdx.x, blockDim.x);
        }
        is_first = own.z != z;
        if (of_warp) {
            real top = minus_infinity(), least = -minus_infinity();
#pragma unroll
            for (int v = 0; v < VALUES; ++v) {
                top = fmax(top, a[v]);
                least = least_finite(least, a[v]);
            }
            top = warp_max(top);
            // What was in the place is in registers now.
            if (place + 2 < length) begin_row(logits + int64(next.t) * k, k, arrived);
            end_of_copies();
            Pack* const taken = arrived;
            arrived = arriving;
            arriving = taken;
            if (theta_near && __ballot_sync(ALL_LANES, least - top < FAR) == 0) {
                real sum = 0, joint_sum = 0;
#pragma unroll
                for (int v = 0; v < VALUES; ++v) {
                    a[v] = exp(a[v] - top);
                    sum += a[v];
                    joint_sum += a[v] * theta[v / PACK * ROW_THREADS].of[v % PACK];
                }
                sum = warp_sum(sum);
                joint_sum = warp_sum(joint_sum);
                const real per_sum = 1 / sum, per_joint_sum = 1 / joint_sum;
#pragma unroll
                for (int v = 0; v < VALUES; ++v) {
                    // If the label is unreachable, all products are zero: c is NaN, log m is -inf.
                    const real c =
                        a[v] * (theta[v / PACK * ROW_THREADS].of[v % PACK] * per_joint_sum);
                    count[v] += c;
                    a[v] = product(a[v] * per_sum - c, per_n);
                }
                store_row(a, d_logits + t * k, k);
                log_m_sum += double(log(joint_sum) - log(sum));
            } else {
                log_m_sum += double(
                    far_row(logits + t * k, log_theta, k, per_n, d_logits + t * k, theta));
#pragma unroll
                for (int v = 0; v < VALUES; ++v)
                    count[v] += theta[v / PACK * ROW_THREADS].of[v % PACK];
                is_first = true;  // theta is to be taken again
            }
        } else {
            real q[VALUES];
            log_m_sum += double(posterior_of_row(a, log_theta, k, q));
#pragma unroll
            for (int v = 0; v < VALUES; ++v) {
                count[v] += a[v];
                q[v] = product(q[v] - a[v], per_n);
            }
            store_row(q, d_logits + t * k, k);
        }
        const bool is_last = own.z != z || place + 1 == length;  // of its label
        if (!is_last && ((place - first_place + 1) & (together - 1))) continue;
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
            count_before[v] += count[v];
            count[v] = 0;
        }
        if (!is_last) continue;
        const int64 row = counts_row(unit, z, begin + first_place, by_place);
        store_row(count_before, counts + row * k, k);
        first_place = place + 1;
#pragma unroll
        for (int v = 0; v < VALUES; ++v) count_before[v] = 0;
    }
    if constexpr (of_warp) wait_for_copies<0>();
    if (threadIdx.x == 0) log_m_u[unit] = log_m_sum;
}
