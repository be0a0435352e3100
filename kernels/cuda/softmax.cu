// The classifier alone: cross-entropy against labels or against soft targets, a row per sample.

extern "C" __global__ void WIDE softmax_nll_rows(
    const real* logits, const int64* labels, int64 n, int64 k, real* log_q_z_t, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    const real* a_i = logits + t * k;
    const LogSum all = row_log_softmax(a_i, k);
    const real log_sum = log(all.sum);
    const int64 z = labels[t];
    const real spoilt = is_class(z, k) ? real(0) : not_a_number();
#pragma unroll 4
    for (int64 i = threadIdx.x; i < k; i += blockDim.x) {
        const real log_q = (a_i[i] - all.top) - log_sum;  // Eq. 7
        d_logits[t * k + i] = quotient((exp(log_q) - real(i == z)) + spoilt, real(n));
        if (i == z) log_q_z_t[t] = log_q;
    }
    if (threadIdx.x == 0 && !is_class(z, k)) log_q_z_t[t] = spoilt;
}

// Eq. 5: score_t = sum_i c_ti log q_ti, with 0 log 0 = 0.
extern "C" __global__ void WIDE soft_target_nll_rows(
    const real* logits, const real* targets, int64 n, int64 k, real* score_t, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    const real* a_i = logits + t * k;
    const real* c_i = targets + t * k;
    const LogSum all = row_log_softmax(a_i, k);
    const real log_sum = log(all.sum);
    double score = 0;
#pragma unroll 4
    for (int64 i = threadIdx.x; i < k; i += blockDim.x) {
        const real log_q = (a_i[i] - all.top) - log_sum;
        if (c_i[i] > 0) score += double(c_i[i] * log_q);
        d_logits[t * k + i] = quotient(exp(log_q) - c_i[i], real(n));
    }
    score = row_sum(score);
    if (threadIdx.x == 0) score_t[t] = real(score);
}
