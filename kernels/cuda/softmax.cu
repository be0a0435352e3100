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

// The same two for rows in registers. q_ti = exp(a_ti - top_t) / sum_t; the padding is -inf.
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
