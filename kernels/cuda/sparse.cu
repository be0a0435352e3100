// The sparse models: each true class i keeps n_kept links, link e = i * n_kept + s. A sample meets
// only the links that lead to its label z, links_by_label[start_j[z] .. start_j[z + 1]); each comes
// from another true class. What belongs to such a pair (t, i) stands in cell [t, i] of an (n, K)
// array, pair_ti; its other cells are neither written nor read.

// log theta_i,z_t of the sparse s-model, for the pairs: a softmax over the n_kept links of row i.
extern "C" __global__ void WIDE sparse_s_log_theta(
    const real* channel_logits, const int64* links_by_label, const int64* start_j,
    const int64* labels, int64 n, int64 k, int64 n_kept, real* pair_ti) {
    const int64 t = my_row();
    if (t >= n || !is_class(labels[t], k)) return;
    for (int64 p = start_j[labels[t]] + threadIdx.x; p < start_j[labels[t] + 1]; p += blockDim.x) {
        const int64 e = links_by_label[p], i = e / n_kept;
        LogSum all = nothing_yet();
        for (int64 s = 0; s < n_kept; ++s) all.add(channel_logits[i * n_kept + s]);
        pair_ti[t * k + i] = (channel_logits[e] - all.top) - log(all.sum);  // Eq. 10
    }
}

// Eqs. 3 and 11: log theta_i,z_t of the pairs becomes c_ti; c = 0 for a class
// without a link to z_t. Of posterior and d_logits, what is not wanted is null.
extern "C" __global__ void WIDE sparse_posterior_rows(
    const real* logits, const int64* links_by_label, const int64* start_j, const int64* labels,
    int64 n, int64 k, int64 n_kept, real* pair_ti, real* log_m_t, real* posterior, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    const int64 z = labels[t];
    const bool has_label = is_class(z, k);
    const int64 begin = has_label ? start_j[z] : 0, end = has_label ? start_j[z + 1] : 0;
    const real* a_i = logits + t * k;
    real* pair_i = pair_ti + t * k;

    const LogSum all = row_log_softmax(a_i, k);
    const real log_sum = log(all.sum);
    LogSum joint = nothing_yet();
    for (int64 p = begin + threadIdx.x; p < end; p += blockDim.x) {
        const int64 i = links_by_label[p] / n_kept;
        joint.add(((a_i[i] - all.top) - log_sum) + pair_i[i]);
    }
    joint = row_log_sum(joint);
    const real log_m = has_label ? joint.log_of_all() : not_a_number();  // Eq. 11
    if (threadIdx.x == 0) log_m_t[t] = log_m;

    const real c_elsewhere = exp(minus_infinity() - log_m);  // 0, or NaN: an unreachable label
#pragma unroll 4
    for (int64 i = threadIdx.x; i < k; i += blockDim.x) {
        if (posterior) posterior[t * k + i] = c_elsewhere;
        if (d_logits)
            d_logits[t * k + i] = quotient(exp((a_i[i] - all.top) - log_sum) - c_elsewhere, real(n));
    }
    wait_for_row();  // the linked cells are written once more, by other threads
    for (int64 p = begin + threadIdx.x; p < end; p += blockDim.x) {
        const int64 i = links_by_label[p] / n_kept;
        const real log_q = (a_i[i] - all.top) - log_sum;  // Eq. 7
        const real c = exp((log_q + pair_i[i]) - log_m);  // Eq. 3
        pair_i[i] = c;
        if (posterior) posterior[t * k + i] = c;
        if (d_logits) d_logits[t * k + i] = quotient(exp(log_q) - c, real(n));
    }
}

// N_is = sum over the samples of the link's label of c_ti. A row of threads owns label j and with
// it all links that lead there; it adds in a fixed order, in float64.
extern "C" __global__ void WIDE sparse_counts(
    const real* c_ti, const int64* links_by_label, const int64* start_j, const int64* order,
    const int64* ends_jb, int64 n_chunks, int64 k, int64 n_kept, real* counts_is) {
    const int64 j = my_row();
    if (j >= k) return;
    const int64 begin = group_begin(ends_jb, n_chunks, j);
    const int64 end = group_begin(ends_jb, n_chunks, j + 1);
    if (begin == end) {
        for (int64 p = start_j[j] + threadIdx.x; p < start_j[j + 1]; p += blockDim.x)
            counts_is[links_by_label[p]] = 0;
        return;
    }
    for (int64 p = start_j[j]; p < start_j[j + 1]; ++p) {
        const int64 e = links_by_label[p], i = e / n_kept;
        double mine = 0;
        for (int64 place = begin + threadIdx.x; place < end; place += blockDim.x)
            mine += double(c_ti[order[place] * k + i]);
        const double sum = row_sum(mine);
        if (threadIdx.x == 0) counts_is[e] = real(sum);
    }
}

// Counts become d_channel_logits = (n_i theta_is - N_is) / n, in place, a row per true class.
extern "C" __global__ void WIDE sparse_channel_gradient(
    const real* channel_logits, int64 n, int64 k, int64 n_kept, real* counts_is) {
    const int64 i = my_row();
    if (i >= k) return;
    const real* b_s = channel_logits + i * n_kept;
    real* row_s = counts_is + i * n_kept;
    const LogSum all = row_log_softmax(b_s, n_kept);
    const real log_sum = log(all.sum);
    double mine = 0;
    for (int64 s = threadIdx.x; s < n_kept; s += blockDim.x) mine += double(row_s[s]);
    const double n_i = row_sum(mine);
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

// dnll/du_is = sum_t G_tis h_t and dnll/dB_is = sum_t G_tis. A block per link: the samples that
// meet row i are those whose label is one of the row's, label by label.
extern "C" __global__ void sparse_c_weight_gradient(
    const real* hidden, const real* channel_weights, const real* channel_logits,
    const int64* support, const int64* order, const int64* ends_jb, int64 n_chunks,
    const real* c_ti, const real* log_sum_ti, int64 n, int64 k, int64 n_kept, int64 d,
    real* d_channel_weights, real* d_channel_logits) {
    __shared__ real gradient[WARPS];
    __shared__ int64 sample[WARPS];
    const int64 e = blockIdx.x, i = e / n_kept;
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
