// The c-model, on tiles of scores h_t u_ij from a matrix product, (samples, true classes, observed
// classes). A row of a tile belongs to one sample t and one true class i.
//
// A tile starts at sample first_t and true class first_i and is n_classes classes wide.

// log theta_t,i,z_t (Eq. 8), one number per row; the scores stay as they are.
extern "C" __global__ void WIDE channel_log_theta_z(
    const real* scores, const real* channel_logits, const int64* labels, int64 n_rows,
    int64 first_t, int64 first_i, int64 n_classes, int64 k, real* log_theta_z_ti) {
    const int64 row = my_row();
    if (row >= n_rows) return;
    const int64 t = first_t + row / n_classes, i = first_i + row % n_classes;
    const real* score_j = scores + row * k;
    const real* b_j = channel_logits + i * k;
    LogSum all = nothing_yet();
#pragma unroll 4
    for (int64 j = threadIdx.x; j < k; j += blockDim.x) all.add(score_j[j] + b_j[j]);
    all = row_log_sum(all);
    const int64 z = labels[t];
    if (threadIdx.x == 0)
        log_theta_z_ti[t * k + i] =
            is_class(z, k) ? ((score_j[z] + b_j[z]) - all.top) - log(all.sum) : not_a_number();
}

// Scores become their gradients, in place: G_tij = c_ti (theta_t,ij - 1{j=z_t}) / n.
extern "C" __global__ void WIDE channel_score_gradients(
    real* scores, const real* channel_logits, const int64* labels, const real* c_ti, int64 n_rows,
    int64 first_t, int64 first_i, int64 n_classes, int64 n, int64 k) {
    const int64 row = my_row();
    if (row >= n_rows) return;
    const int64 t = first_t + row / n_classes, i = first_i + row % n_classes;
    real* score_j = scores + row * k;
    const real* b_j = channel_logits + i * k;
    LogSum all = nothing_yet();
#pragma unroll 4
    for (int64 j = threadIdx.x; j < k; j += blockDim.x) all.add(score_j[j] + b_j[j]);
    all = row_log_sum(all);
    const real log_sum = log(all.sum), c = c_ti[t * k + i];
    const int64 z = labels[t];
#pragma unroll 4
    for (int64 j = threadIdx.x; j < k; j += blockDim.x) {
        const real theta = exp(((score_j[j] + b_j[j]) - all.top) - log_sum);  // Eq. 8
        score_j[j] = c * (theta - real(j == z)) / real(n);
    }
}

// sums[column] += the sum over rows, in float64 and always in the same order; blocks of (32, 8).
extern "C" __global__ void add_column_sums(const real* values, int64 n_rows, int64 n_columns,
                                           double* sums) {
    __shared__ double partial[8][33];
    const int64 column = int64(blockIdx.x) * 32 + threadIdx.x;
    double mine = 0;
    if (column < n_columns) {
#pragma unroll 4
        for (int64 row = threadIdx.y; row < n_rows; row += 8)
            mine += double(values[row * n_columns + column]);
    }
    partial[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y != 0 || column >= n_columns) return;
    for (int y = 1; y < 8; ++y) mine += partial[y][threadIdx.x];
    sums[column] += mine;
}
