// The s-model. Column z of log theta is all that a sample needs of the noise layer, so log theta is
// transposed first and a column becomes a contiguous row.

// The two parts of a row's log-sum-exp: log theta_ij = (B_ij - top_i) - log_sum_i (Eq. 10).
extern "C" __global__ void WIDE channel_log_sums(
    const real* channel_logits, int64 k, int64 n_kept, real* top_i, real* log_sum_i) {
    const int64 i = my_row();
    if (i >= k) return;
    const LogSum all = row_log_softmax(channel_logits + i * n_kept, n_kept);
    if (threadIdx.x == 0) {
        top_i[i] = all.top;
        log_sum_i[i] = log(all.sum);
    }
}

// log_theta_ji = log theta_ij, by tiles of 32 x 32; blocks of (32, 8) threads.
extern "C" __global__ void log_theta_columns(const real* channel_logits, const real* top_i,
                                             const real* log_sum_i, int64 k, real* log_theta_ji) {
    __shared__ real tile[32][33];  // 33: a column's numbers lie in different banks
    const int64 first_i = int64(blockIdx.y) * 32, first_j = int64(blockIdx.x) * 32;
    const int64 j = first_j + threadIdx.x;
    for (unsigned row = threadIdx.y; row < 32; row += 8) {
        const int64 i = first_i + row;
        if (i < k && j < k)
            tile[row][threadIdx.x] = (channel_logits[i * k + j] - top_i[i]) - log_sum_i[i];
    }
    __syncthreads();
    const int64 i = first_i + threadIdx.x;
    for (unsigned row = threadIdx.y; row < 32; row += 8) {
        const int64 j_out = first_j + row;
        if (i < k && j_out < k) log_theta_ji[j_out * k + i] = tile[threadIdx.x][row];
    }
}

// Eqs. 3 and 11 for a row per sample: log m_t, then c_ti, d_logits or both.
//
// The noise layer comes as log theta_i,z_t: row z_t of log_theta_ji where by_label, else row t; in
// the second case c_ti may be the same array. Pointers to results that are not wanted are null;
// log_q_parts (n, 2) gets the two parts of log q_ti = (a_ti - top_t) - log_sum_t.
extern "C" __global__ void WIDE posterior_rows(
    const real* logits, const real* log_theta, int by_label, const int64* labels, int64 n, int64 k,
    real* log_m_t, real* log_q_parts, real* c_ti, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    const int64 z = labels[t];
    if (!is_class(z, k)) {
        for (int64 i = threadIdx.x; i < k; i += blockDim.x) {
            if (c_ti) c_ti[t * k + i] = not_a_number();
            if (d_logits) d_logits[t * k + i] = not_a_number();
        }
        if (threadIdx.x == 0) log_m_t[t] = not_a_number();
        return;
    }
    const real* a_i = logits + t * k;
    const real* log_theta_i = log_theta + (by_label ? z : t) * k;

    const LogSum all = row_log_softmax(a_i, k);
    const real log_sum = log(all.sum);
    LogSum joint = nothing_yet();
#pragma unroll 4
    for (int64 i = threadIdx.x; i < k; i += blockDim.x)
        joint.add(((a_i[i] - all.top) - log_sum) + log_theta_i[i]);
    const real log_m = row_log_sum(joint).log_of_all();  // Eq. 11

#pragma unroll 4
    for (int64 i = threadIdx.x; i < k; i += blockDim.x) {
        const real log_q = (a_i[i] - all.top) - log_sum;  // Eq. 7
        // An unreachable label has log m = -inf, and all of its terms are: c is NaN.
        const real c = exp((log_q + log_theta_i[i]) - log_m);  // Eq. 3
        if (c_ti) c_ti[t * k + i] = c;
        if (d_logits) d_logits[t * k + i] = quotient(exp(log_q) - c, real(n));
    }
    if (threadIdx.x != 0) return;
    log_m_t[t] = log_m;
    if (log_q_parts) {
        log_q_parts[2 * t] = all.top;
        log_q_parts[2 * t + 1] = log_sum;
    }
}

// N_ij = sum over the samples of label j of c_ti, written as N_ji over log theta_ji, where a label
// occurs. Block (x: true classes, y: samples) owns label blockIdx.x; each y adds its samples in
// order, in float64, and the y's are added in order: the same bits in every run. c is computed a
// second time, from the logits, rather than written and read.
extern "C" __global__ void posterior_counts(const real* logits, const real* log_q_parts,
                                            const real* log_m_t, const int64* order,
                                            const int64* ends_jb, int64 n_chunks, int64 k,
                                            real* log_theta_ji) {
    __shared__ double counts[256];
    const int64 j = blockIdx.x;
    const int64 i = int64(blockIdx.y) * blockDim.x + threadIdx.x;
    const int64 begin = group_begin(ends_jb, n_chunks, j);
    const int64 end = group_begin(ends_jb, n_chunks, j + 1);
    if (begin == end) return;  // the whole block
    const real log_theta = i < k ? log_theta_ji[j * k + i] : real(0);
    double mine = 0;
    if (i < k) {
#pragma unroll 4
        for (int64 place = begin + threadIdx.y; place < end; place += blockDim.y) {
            const int64 t = order[place];
            const real log_q = (logits[t * k + i] - log_q_parts[2 * t]) - log_q_parts[2 * t + 1];
            mine += double(exp((log_q + log_theta) - log_m_t[t]));
        }
    }
    counts[threadIdx.y * blockDim.x + threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y != 0 || i >= k) return;
    for (unsigned y = 1; y < blockDim.y; ++y) mine += counts[y * blockDim.x + threadIdx.x];
    log_theta_ji[j * k + i] = real(mine);
}

__device__ inline bool occurs(const int64* ends_jb, int64 n_chunks, int64 j) {
    return group_begin(ends_jb, n_chunks, j) < group_begin(ends_jb, n_chunks, j + 1);
}

// n_i = sum_j N_ij over the labels that occur; blocks of (32, 32) threads.
extern "C" __global__ void WIDE class_totals(
    const real* counts_ji, const int64* ends_jb, int64 n_chunks, int64 k, double* n_i) {
    __shared__ double totals[32][33];
    const int64 i = int64(blockIdx.x) * 32 + threadIdx.x;
    double mine = 0;
    if (i < k) {
#pragma unroll 4
        for (int64 j = threadIdx.y; j < k; j += 32)
            if (occurs(ends_jb, n_chunks, j)) mine += double(counts_ji[j * k + i]);
    }
    totals[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y != 0 || i >= k) return;
    for (int y = 1; y < 32; ++y) mine += totals[y][threadIdx.x];
    n_i[i] = mine;
}

// d_channel_logits = (n_i theta_ij - N_ij) / n, by tiles of 32 x 32; blocks of (32, 8) threads.
extern "C" __global__ void channel_gradient(const real* channel_logits, const real* top_i,
                                            const real* log_sum_i, const real* counts_ji,
                                            const double* n_i, const int64* ends_jb,
                                            int64 n_chunks, int64 n, int64 k,
                                            real* d_channel_logits) {
    __shared__ real counts[32][33];
    const int64 first_i = int64(blockIdx.y) * 32, first_j = int64(blockIdx.x) * 32;
    const int64 i_in = first_i + threadIdx.x;
    for (unsigned row = threadIdx.y; row < 32; row += 8) {
        const int64 j = first_j + row;
        if (i_in < k && j < k)
            counts[row][threadIdx.x] =
                occurs(ends_jb, n_chunks, j) ? counts_ji[j * k + i_in] : real(0);
    }
    __syncthreads();
    const int64 j = first_j + threadIdx.x;
    for (unsigned row = threadIdx.y; row < 32; row += 8) {
        const int64 i = first_i + row;
        if (i >= k || j >= k) continue;
        const real log_theta = (channel_logits[i * k + j] - top_i[i]) - log_sum_i[i];
        const double expected = n_i[i] * double(exp(log_theta));
        d_channel_logits[i * k + j] =
            real((expected - double(counts[threadIdx.x][row])) / double(n));
    }
}
