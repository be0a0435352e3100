// The sparse models: each true class i keeps n_kept links, link e = i * n_kept + s. A sample meets
// only the links that lead to its label z, links_by_label[start_j[z] .. start_j[z + 1]), ascending;
// each comes from another true class.
//
// log theta of such a pair (t, i) is worked out from row i of B wherever it is needed. The c-model's
// stands in cell [t, i] of an (n, K) array, pair_ti, whose other cells are neither written nor read;
// the s-model has none: null.

__device__ inline int64 parts_of(int64 size, int64 part) { return (size + part - 1) / part; }

// The pairs of a sample.
struct Pairs {
    int64 begin, end;
};

__device__ inline Pairs pairs_of(const int64* start_j, int64 z, int64 k) {
    Pairs none = {0, 0};
    if (!is_class(z, k)) return none;
    Pairs pairs = {start_j[z], start_j[z + 1]};
    return pairs;
}

// log theta_i,z of the sparse s-model for link e: a softmax over the n_kept links of its row i.
__device__ inline real link_log_theta(const real* channel_logits, int64 e, int64 n_kept) {
    const real* b_s = channel_logits + e / n_kept * n_kept;
    LogSum all = nothing_yet();
    for (int64 s = 0; s < n_kept; ++s) all.add(b_s[s]);
    return (channel_logits[e] - all.top) - log(all.sum);  // Eq. 10
}

const int AT_ONCE = 4;  // numbers that a thread loads before it needs the first of them

// As row_log_softmax, for rows that are not in the cache.
__device__ inline LogSum log_sum_of(const real* a_i, int64 length) {
    LogSum all = nothing_yet();
    for (int64 first = threadIdx.x; first < length; first += AT_ONCE * blockDim.x) {
        real x[AT_ONCE];
#pragma unroll
        for (int m = 0; m < AT_ONCE; ++m) {
            const int64 i = first + m * blockDim.x;
            x[m] = i < length ? a_i[i] : minus_infinity();
        }
        all.add_all(x);
    }
    return row_log_sum(all);
}

// log m_t (Eq. 11) of a row of logits, by all its threads.
__device__ inline real joint_log_sum(const real* a_i, real top, real log_sum,
                                     const real* channel_logits, const int64* links_by_label,
                                     Pairs pairs, int64 n_kept, const real* pair_i, bool has_label) {
    LogSum joint = nothing_yet();
    for (int64 p = pairs.begin + threadIdx.x; p < pairs.end; p += blockDim.x) {
        const int64 e = links_by_label[p], i = e / n_kept;
        const real log_theta = pair_i ? pair_i[i] : link_log_theta(channel_logits, e, n_kept);
        joint.add(((a_i[i] - top) - log_sum) + log_theta);
    }
    joint = row_log_sum(joint);
    return has_label ? joint.log_of_all() : not_a_number();
}

// Eqs. 3 and 11 for the cells [first, last) of a row, by all its threads; c = 0 for a class without
// a link to z_t. pair_i, if there is one, becomes c; results that are not wanted are null.
__device__ inline void write_cells(const real* a_i, real top, real log_sum, real log_m,
                                   const real* channel_logits, const int64* links_by_label,
                                   Pairs pairs, int64 first, int64 last, int64 n, int64 n_kept,
                                   real* pair_i, real* posterior_i, real* d_logits_i) {
    const real c_elsewhere = exp(minus_infinity() - log_m);  // 0, or NaN: an unreachable label
    if (posterior_i)
        for (int64 i = first + threadIdx.x; i < last; i += blockDim.x) posterior_i[i] = c_elsewhere;
    if (d_logits_i) {
        for (int64 here = first + threadIdx.x; here < last; here += AT_ONCE * blockDim.x) {
            real x[AT_ONCE];
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) {
                const int64 i = here + m * blockDim.x;
                if (i < last) x[m] = a_i[i];
            }
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) {
                const int64 i = here + m * blockDim.x;
                const real q = exp((x[m] - top) - log_sum);
                if (i < last) d_logits_i[i] = quotient(q - c_elsewhere, real(n));
            }
        }
    }
    wait_for_row();  // the linked cells are written once more, by other threads
    int64 p = pairs.begin;  // the first pair whose class is not before ``first``
    for (int64 end = pairs.end; p < end;) {
        const int64 middle = p + (end - p) / 2;
        if (links_by_label[middle] < first * n_kept) p = middle + 1;
        else end = middle;
    }
    for (p += threadIdx.x; p < pairs.end; p += blockDim.x) {
        const int64 e = links_by_label[p], i = e / n_kept;
        if (i >= last) return;
        const real log_q = (a_i[i] - top) - log_sum;  // Eq. 7
        const real log_theta = pair_i ? pair_i[i] : link_log_theta(channel_logits, e, n_kept);
        const real c = exp((log_q + log_theta) - log_m);  // Eq. 3
        if (pair_i) pair_i[i] = c;
        if (posterior_i) posterior_i[i] = c;
        if (d_logits_i) d_logits_i[i] = quotient(exp(log_q) - c, real(n));
    }
}

__device__ inline real* row_of(real* array, int64 t, int64 k) { return array ? array + t * k : 0; }

// A row of logits at a time. Of log_q_ti = (a_ti - top_t) - log_sum_t, log_q_parts (n, 2) gets the
// two parts.
extern "C" __global__ void WIDE sparse_posterior_rows(
    const real* logits, const real* channel_logits, const int64* links_by_label,
    const int64* start_j, const int64* labels, int64 n, int64 k, int64 n_kept, real* pair_ti,
    real* log_q_parts, real* log_m_t, real* posterior, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    const Pairs pairs = pairs_of(start_j, labels[t], k);
    const real* a_i = logits + t * k;
    real* pair_i = row_of(pair_ti, t, k);
    const LogSum all = log_sum_of(a_i, k);
    const real log_sum = log(all.sum);
    const real log_m = joint_log_sum(a_i, all.top, log_sum, channel_logits, links_by_label, pairs,
                                     n_kept, pair_i, is_class(labels[t], k));
    if (threadIdx.x == 0) {
        log_m_t[t] = log_m;
        log_q_parts[2 * t] = all.top;
        log_q_parts[2 * t + 1] = log_sum;
    }
    write_cells(a_i, all.top, log_sum, log_m, channel_logits, links_by_label, pairs, 0, k, n,
                n_kept, pair_i, row_of(posterior, t, k), row_of(d_logits, t, k));
}

// The same for long rows, in three kernels: a block has part_length numbers of a row.
extern "C" __global__ void WIDE row_part_log_sums(const real* logits, int64 k, int64 part_length,
                                                  real* log_sum_parts) {
    const int64 t = blockIdx.x, part = blockIdx.y, n_parts = parts_of(k, part_length);
    const int64 first = part * part_length;
    const LogSum all =
        log_sum_of(logits + t * k + first, k - first < part_length ? k - first : part_length);
    if (threadIdx.x != 0) return;
    log_sum_parts[2 * (t * n_parts + part)] = all.top;
    log_sum_parts[2 * (t * n_parts + part) + 1] = all.sum;
}

extern "C" __global__ void WIDE sparse_joint_log_sums(
    const real* logits, const real* channel_logits, const int64* links_by_label,
    const int64* start_j, const int64* labels, int64 n, int64 k, int64 n_kept, int64 part_length,
    const real* log_sum_parts, const real* pair_ti, real* log_q_parts, real* log_m_t) {
    const int64 t = my_row(), n_parts = parts_of(k, part_length);
    if (t >= n) return;
    LogSum all = nothing_yet();
    for (int64 part = threadIdx.x; part < n_parts; part += blockDim.x) {
        const real* one = log_sum_parts + 2 * (t * n_parts + part);
        LogSum other = {one[0], one[1]};
        all = joined(all, other);
    }
    all = row_log_sum(all);
    const real log_sum = log(all.sum);
    const real log_m = joint_log_sum(logits + t * k, all.top, log_sum, channel_logits,
                                     links_by_label, pairs_of(start_j, labels[t], k), n_kept,
                                     pair_ti ? pair_ti + t * k : 0, is_class(labels[t], k));
    if (threadIdx.x != 0) return;
    log_m_t[t] = log_m;
    log_q_parts[2 * t] = all.top;
    log_q_parts[2 * t + 1] = log_sum;
}

extern "C" __global__ void WIDE sparse_posterior_parts(
    const real* logits, const real* channel_logits, const int64* links_by_label,
    const int64* start_j, const int64* labels, int64 n, int64 k, int64 n_kept, int64 part_length,
    real* pair_ti, const real* log_q_parts, const real* log_m_t, real* posterior, real* d_logits) {
    const int64 t = blockIdx.x, first = blockIdx.y * part_length;
    const int64 last = first + part_length < k ? first + part_length : k;
    write_cells(logits + t * k, log_q_parts[2 * t], log_q_parts[2 * t + 1], log_m_t[t],
                channel_logits, links_by_label, pairs_of(start_j, labels[t], k), first, last, n,
                n_kept, row_of(pair_ti, t, k), row_of(posterior, t, k), row_of(d_logits, t, k));
}

// c_ti of a pair once more, from what its row left.
__device__ inline double pair_posterior(const real* logits, const real* log_q_parts,
                                        const real* log_m_t, real log_theta, int64 t, int64 i,
                                        int64 k) {
    const real log_q = (logits[t * k + i] - log_q_parts[2 * t]) - log_q_parts[2 * t + 1];
    return double(exp((log_q + log_theta) - log_m_t[t]));
}

// N_is = sum over the samples of the link's label of c_ti, for the labels that occur; the others are
// zero already. A row of threads owns label j and with it all links that lead there; it adds in a
// fixed order, in float64. With by_sample a row belongs to a sample, and the first of a label's
// owns it: fewer than a row for each label, where n < K. The threads share the label's samples or,
// where those are few, its links.
extern "C" __global__ void WIDE sparse_counts(
    const real* logits, const real* channel_logits, const real* log_q_parts, const real* log_m_t,
    const int64* links_by_label, const int64* start_j, const int64* labels, const int64* order,
    const int64* ends_jb, int64 n_chunks, int by_sample, int64 n_rows, int64 k, int64 n_kept,
    real* counts_is) {
    const int64 row = my_row();
    if (row >= n_rows || (by_sample && row >= group_begin(ends_jb, n_chunks, k))) return;
    const int64 j = by_sample ? labels[order[row]] : row;
    const int64 begin = group_begin(ends_jb, n_chunks, j);
    const int64 end = group_begin(ends_jb, n_chunks, j + 1);
    if (begin == end || (by_sample && row != begin)) return;
    const bool by_link = end - begin <= 4;
    const int64 first_p = start_j[j] + (by_link ? threadIdx.x : 0);
    for (int64 p = first_p; p < start_j[j + 1]; p += by_link ? blockDim.x : 1) {
        const int64 e = links_by_label[p], i = e / n_kept;
        const real log_theta = link_log_theta(channel_logits, e, n_kept);
        double sum = 0;
        for (int64 place = begin + (by_link ? 0 : threadIdx.x); place < end;
             place += by_link ? 1 : blockDim.x)
            sum += pair_posterior(logits, log_q_parts, log_m_t, log_theta, order[place], i, k);
        if (!by_link) sum = row_sum(sum);
        if (by_link || threadIdx.x == 0) counts_is[e] = real(sum);
    }
}

// Counts become d_channel_logits = (n_i theta_is - N_is) / n, in place, a row per true class: by a
// single thread (blockDim.x is 1), or by threads that share what each found.
extern "C" __global__ void WIDE sparse_channel_gradient(
    const real* channel_logits, int64 n, int64 k, int64 n_kept, real* counts_is) {
    const int64 i = my_row();
    if (i >= k) return;
    const real* b_s = channel_logits + i * n_kept;
    real* row_s = counts_is + i * n_kept;
    LogSum all = nothing_yet();
    double n_i = 0;
    for (int64 s = threadIdx.x; s < n_kept; s += blockDim.x) {
        all.add(b_s[s]);
        n_i += double(row_s[s]);
    }
    if (blockDim.x > 1) {
        all = row_log_sum(all);
        n_i = row_sum(n_i);
    }
    const real log_sum = log(all.sum);
    for (int64 s = threadIdx.x; s < n_kept; s += blockDim.x) {
        const double expected = n_i * double(exp((b_s[s] - all.top) - log_sum));
        row_s[s] = real((expected - double(row_s[s])) / double(n));
    }
}

// u_ij h_t + B_ij, by one warp; all lanes get it, with the same bits wherever it is computed.
__device__ inline real link_score(const real* u_d, const real* h_d, real b, int64 d) {
    real mine = 0;
#pragma unroll 4
    for (int64 f = threadIdx.x; f < d; f += 32) mine += u_d[f] * h_d[f];
    return warp_sum(mine) + b;
}

// log theta_t,i,z_t of the sparse c-model (Eq. 8) for the pairs, and the log-sum-exp of the pair's
// n_kept scores, unless null. A block of (32, 8) per sample, a warp per pair.
extern "C" __global__ void sparse_c_log_theta(const real* hidden, const real* channel_weights,
                                              const real* channel_logits,
                                              const int64* links_by_label, const int64* start_j,
                                              const int64* labels, int64 k, int64 n_kept, int64 d,
                                              real* pair_ti, real* log_sum_ti) {
    const int64 t = blockIdx.x;
    if (!is_class(labels[t], k)) return;
    const real* h_d = hidden + t * d;
    for (int64 p = start_j[labels[t]] + threadIdx.y; p < start_j[labels[t] + 1]; p += blockDim.y) {
        const int64 e_z = links_by_label[p], i = e_z / n_kept;
        LogSum all = nothing_yet();
        real score_z = 0;
        for (int64 e = i * n_kept; e < (i + 1) * n_kept; ++e) {
            const real score = link_score(channel_weights + e * d, h_d, channel_logits[e], d);
            all.add(score);
            if (e == e_z) score_z = score;
        }
        if (threadIdx.x != 0) continue;
        pair_ti[t * k + i] = (score_z - all.top) - log(all.sum);
        if (log_sum_ti) log_sum_ti[t * k + i] = all.log_of_all();
    }
}

// G_tis = c_ti (theta_t,is - 1{link s leads to z_t}) / n
__device__ inline real score_gradient(real score, real log_sum, real c, bool is_z, int64 n) {
    return c * (exp(score - log_sum) - real(is_z)) / real(n);
}

const int WARPS = 8;                // of a block of (32, 8) threads
const int FEATURES = 4;             // of one thread
const int FEATURES_OF_BLOCK = 1024;  // = 32 * WARPS * FEATURES; more are for blockIdx.y

// The part of dnll/dh_t that comes through the noise layer, sum_is G_tis u_is. A block per sample:
// its warps find eight G at a time, then all threads add them up for their features, in order.
extern "C" __global__ void sparse_c_hidden_gradient(
    const real* hidden, const real* channel_weights, const real* channel_logits,
    const int64* links_by_label, const int64* start_j, const int64* labels, const real* c_ti,
    const real* log_sum_ti, int64 n, int64 k, int64 n_kept, int64 d, real* d_hidden) {
    __shared__ real gradient[WARPS];
    __shared__ int64 link[WARPS];
    const int64 t = blockIdx.x, z = labels[t];
    const int64 first = int64(blockIdx.y) * FEATURES_OF_BLOCK + threadIdx.y * 32 + threadIdx.x;
    const bool has_label = is_class(z, k);
    const int64 begin = has_label ? start_j[z] : 0;
    const int64 n_scores = has_label ? (start_j[z + 1] - begin) * n_kept : 0;
    double sum[FEATURES] = {0, 0, 0, 0};
    for (int64 batch = 0; batch < n_scores; batch += WARPS) {
        const int64 mine = batch + threadIdx.y;
        if (mine < n_scores) {
            const int64 e_z = links_by_label[begin + mine / n_kept], i = e_z / n_kept;
            const int64 e = i * n_kept + mine % n_kept;
            const real score =
                link_score(channel_weights + e * d, hidden + t * d, channel_logits[e], d);
            if (threadIdx.x == 0) {
                link[threadIdx.y] = e;
                gradient[threadIdx.y] = score_gradient(score, log_sum_ti[t * k + i],
                                                       c_ti[t * k + i], e == e_z, n);
            }
        }
        __syncthreads();
        const int length = n_scores - batch < WARPS ? int(n_scores - batch) : WARPS;
        for (int w = 0; w < length; ++w) {
#pragma unroll
            for (int m = 0; m < FEATURES; ++m) {
                const int64 f = first + m * 32 * WARPS;
                if (f < d) sum[m] += double(gradient[w] * channel_weights[link[w] * d + f]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < FEATURES; ++m) {
        const int64 f = first + m * 32 * WARPS;
        if (f < d) d_hidden[t * d + f] = has_label ? real(sum[m]) : not_a_number();
    }
}

// How many samples have a label that class i links to; a thread per class.
extern "C" __global__ void samples_of_classes(const int64* support, const int64* ends_jb,
                                              int64 n_chunks, int64 k, int64 n_kept,
                                              int64* n_samples_i) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= k) return;
    int64 n_samples = 0;
    for (int64 e = i * n_kept; e < (i + 1) * n_kept; ++e)
        n_samples += group_begin(ends_jb, n_chunks, support[e] + 1) -
                     group_begin(ends_jb, n_chunks, support[e]);
    n_samples_i[i] = n_samples;
}

// dnll/du_is = sum_t G_tis h_t and dnll/dB_is = sum_t G_tis. A block per link: the samples that
// meet row i are those whose label is one of the row's, label by label. A row that no sample meets
// is left as it is: zero.
extern "C" __global__ void sparse_c_weight_gradient(
    const real* hidden, const real* channel_weights, const real* channel_logits,
    const int64* support, const int64* n_samples_i, const int64* order, const int64* ends_jb,
    int64 n_chunks, const real* c_ti, const real* log_sum_ti, int64 n, int64 k, int64 n_kept, int64 d,
    real* d_channel_weights, real* d_channel_logits) {
    __shared__ real gradient[WARPS];
    __shared__ int64 sample[WARPS];
    const int64 e = blockIdx.x, i = e / n_kept;
    if (n_samples_i[i] == 0) return;  // the whole block
    const int64 first = int64(blockIdx.y) * FEATURES_OF_BLOCK + threadIdx.y * 32 + threadIdx.x;
    double sum[FEATURES] = {0, 0, 0, 0}, sum_of_gradients = 0;
    for (int64 e_z = i * n_kept; e_z < (i + 1) * n_kept; ++e_z) {
        const int64 begin = group_begin(ends_jb, n_chunks, support[e_z]);
        const int64 end = group_begin(ends_jb, n_chunks, support[e_z] + 1);
        for (int64 batch = begin; batch < end; batch += WARPS) {
            const int64 mine = batch + threadIdx.y;
            if (mine < end) {
                const int64 t = order[mine];
                const real score =
                    link_score(channel_weights + e * d, hidden + t * d, channel_logits[e], d);
                if (threadIdx.x == 0) {
                    sample[threadIdx.y] = t;
                    gradient[threadIdx.y] = score_gradient(score, log_sum_ti[t * k + i],
                                                           c_ti[t * k + i], e == e_z, n);
                }
            }
            __syncthreads();
            const int length = end - batch < WARPS ? int(end - batch) : WARPS;
            for (int w = 0; w < length; ++w) {
                sum_of_gradients += double(gradient[w]);
#pragma unroll
                for (int m = 0; m < FEATURES; ++m) {
                    const int64 f = first + m * 32 * WARPS;
                    if (f < d) sum[m] += double(gradient[w] * hidden[sample[w] * d + f]);
                }
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (int m = 0; m < FEATURES; ++m) {
        const int64 f = first + m * 32 * WARPS;
        if (f < d) d_channel_weights[e * d + f] = real(sum[m]);
    }
    if (blockIdx.y == 0 && threadIdx.x == 0 && threadIdx.y == 0)
        d_channel_logits[e] = real(sum_of_gradients);
}
