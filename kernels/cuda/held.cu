// Rows in registers: softmax.cu's and s_model.cu's work on rows that are read once. A row has up to
// ROW_THREADS * VALUES numbers; each thread holds VALUES of them, in packs of 16 bytes. VALUES,
// ROW_THREADS (blockDim.x), the THREADS of a block and how many blocks are to be RESIDENT on a
// multiprocessor are chosen when the source is compiled.

#define HELD __launch_bounds__(THREADS, RESIDENT)

const int PACK = 16 / sizeof(real);
struct alignas(16) Pack {
    real of[PACK];
};

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

// The pack that a thread's value v begins. Beyond the end of the row there is `beyond`.
__device__ inline Pack load_pack(const real* row, int k, real beyond, int v) {
    Pack pack;
#pragma unroll
    for (int p = 0; p < PACK; ++p) pack.of[p] = beyond;
    const real* const own = row + first_class();
    if (in_packs(row, k)) {
        if (class_of(v) < k) pack = *reinterpret_cast<const Pack*>(own + classes_beyond(v));
    } else {
#pragma unroll
        for (int p = 0; p < PACK; ++p)
            if (class_of(v + p) < k) pack.of[p] = own[classes_beyond(v + p)];
    }
    return pack;
}

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
    real least = 0;
#pragma unroll
    for (int v = 0; v < VALUES; v += PACK) {
        Pack pack = load_pack(log_theta, k, minus_infinity(), v);
#pragma unroll
        for (int p = 0; p < PACK; ++p) {
            least = least_finite(least, pack.of[p]);
            pack.of[p] = exp(pack.of[p]);
        }
        theta[v / PACK * ROW_THREADS] = pack;
    }
    return __ballot_sync(ALL_LANES, least < FAR) == 0;
}

__device__ inline int label_or_minus_one(int64 label, int k) {
    return is_class(label, k) ? int(label) : -1;
}

// Add here, and not where two branches meet again: c would be kept in a register until then.
__device__ inline void add_here(double& sum, real c) {
    sum += double(c);
#ifdef __CUDA_ARCH__
    asm volatile("" : "+d"(sum));
#endif
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
// added in float64 in the order of the samples, in registers; log m_t likewise.
//
// A row of a warp has theta_i,z beside it, in shared memory, and there the next two rows arrive. Where
// nothing can vanish, the joint probabilities are products of exp(a - top) and theta: one exponential
// for each number, not two.
extern "C" __global__ void HELD s_model_rows(
    const real* logits, const real* log_theta_ji, const int64* labels, const int64* order, int64 n,
    int64 n_classes, int64 per_unit, int64 by_place, real* d_logits, real* counts, int* is_used,
    double* log_m_u) {
    constexpr bool of_warp = ROW_THREADS == 32;
    constexpr int row_packs = ROW_THREADS * VALUES / PACK;
    __shared__ Pack packs[of_warp ? 3 * (THREADS / ROW_THREADS) * row_packs : 1];
    const int64 unit = my_row(), begin = unit * per_unit;
    if (begin >= n) return;
    const int k = int(n_classes);
    // The thread's packs of a row are ROW_THREADS apart.
    Pack* const theta = packs + (of_warp ? threadIdx.y * 3 * row_packs + threadIdx.x : 0);
    Pack *arrived = theta + row_packs, *arriving = arrived + row_packs;
    const int64 end = begin + per_unit < n ? begin + per_unit : n;
    const real per_n = 1 / real(n);
    double count[VALUES], log_m_sum = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) count[v] = 0;
    bool is_first = true, theta_near = false;
    int64 t = order[begin], t_next = order[begin + 1 < end ? begin + 1 : begin];
    int64 first_place = begin;  // of its label
    int z = label_or_minus_one(labels[t], k);
    if constexpr (of_warp) {
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
            if (class_of(v) < k) continue;
            arrived[v / PACK * ROW_THREADS].of[v % PACK] = minus_infinity();
            arriving[v / PACK * ROW_THREADS].of[v % PACK] = minus_infinity();
        }
        begin_row(logits + t * k, k, arrived);
        end_of_copies();
        if (begin + 1 < end) begin_row(logits + t_next * k, k, arriving);
        end_of_copies();
    }
    for (int64 place = begin; place < end; ++place) {
        const int64 t_after = order[place + 2 < end ? place + 2 : end - 1];
        const int z_next = label_or_minus_one(labels[t_next], k);
        if (z < 0) {  // as will all that follow be: they come last in the order
            log_m_sum = not_a_number();
            fill_row(not_a_number(), d_logits + t * k, k);
            t = t_next;
            t_next = t_after;
            z = z_next;
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
            prefetch_row(logits + t_next * k, k);
        }
        is_first = z_next != z;
        if (of_warp) {
            real top = minus_infinity(), least = -minus_infinity();
#pragma unroll
            for (int v = 0; v < VALUES; ++v) {
                top = fmax(top, a[v]);
                least = least_finite(least, a[v]);
            }
            top = warp_max(top);
            // What was in the place is in registers now.
            if (place + 2 < end) begin_row(logits + t_after * k, k, arrived);
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
                    add_here(count[v], c);
                    a[v] = product(a[v] * per_sum - c, per_n);
                }
                store_row(a, d_logits + t * k, k);
                log_m_sum += double(log(joint_sum) - log(sum));
            } else {
                log_m_sum += double(
                    far_row(logits + t * k, log_theta, k, per_n, d_logits + t * k, theta));
#pragma unroll
                for (int v = 0; v < VALUES; ++v)
                    count[v] += double(theta[v / PACK * ROW_THREADS].of[v % PACK]);
                is_first = true;  // theta is to be taken again
            }
        } else {
            real q[VALUES];
            log_m_sum += double(posterior_of_row(a, log_theta, k, q));
#pragma unroll
            for (int v = 0; v < VALUES; ++v) {
                count[v] += double(a[v]);
                q[v] = product(q[v] - a[v], per_n);
            }
            store_row(q, d_logits + t * k, k);
        }
        if (z_next != z || place + 1 == end) {
            const int64 row = counts_row(unit, z, first_place, by_place);
            store_row(count, counts + row * k, k);
            if (threadIdx.x == 0) is_used[row] = 1;
            first_place = place + 1;
#pragma unroll
            for (int v = 0; v < VALUES; ++v) count[v] = 0;
        }
        t = t_next;
        t_next = t_after;
        z = z_next;
    }
    if constexpr (of_warp) wait_for_copies<0>();
    if (threadIdx.x == 0) log_m_u[unit] = log_m_sum;
}
