// The c-model, on tiles of scores h_t u_ij from a matrix product, (samples, true classes, observed
// classes). A row of a tile belongs to one sample t and one true class i.
//
// A tile starts at sample first_t and true class first_i and is n_classes classes wide.

const int AT_ONCE = sizeof(real) == 4 ? 8 : 2;  // a thread loads so many before it needs the first

// log theta_t,i,z_t (Eq. 8) and, unless null, the log-sum-exp of the row, one number of each per
// row; the scores stay as they are. A warp per row; those of a block share a class and its biases.
extern "C" __global__ void channel_log_theta_z(
    const real* scores, const real* channel_logits, const int64* labels, int64 n_rows,
    int64 n_samples, int64 first_t, int64 first_i, int64 n_classes, int64 k,
    real* log_theta_z_ti, real* log_sum_ti) {
    const int64 row = my_row();  // class by class
    if (row >= n_rows) return;
    const int64 i_of_tile = divided(row, n_samples), t_of_tile = row - i_of_tile * n_samples;
    const int64 t = first_t + t_of_tile, i = first_i + i_of_tile;
    const real* score_j = scores + (t_of_tile * n_classes + i_of_tile) * k;
    const real* b_j = channel_logits + i * k;
    LogSum all = nothing_yet();
    for (int64 first = threadIdx.x; first < k; first += 32 * AT_ONCE) {
        real x[AT_ONCE];
#pragma unroll
        for (int m = 0; m < AT_ONCE; ++m) {
            const int64 j = first + 32 * m;
            x[m] = j < k ? score_j[j] + b_j[j] : minus_infinity();
        }
        all.add_all(x);
    }
    all = warp_log_sum(all);
    if (threadIdx.x != 0) return;
    const int64 z = labels[t];
    log_theta_z_ti[t * k + i] =
        is_class(z, k) ? ((score_j[z] + b_j[z]) - all.top) - log(all.sum) : not_a_number();
    if (log_sum_ti) log_sum_ti[t * k + i] = all.log_of_all();
}

// Scores become their gradients, in place: G_tij = c_ti (theta_t,ij - 1{j=z_t}) / n. Their sums
// over the tile's samples are added to sums_ij, in float64 and always in the same order. A block
// of (32, 8) threads has 32 columns ij of the tile; each y has every eighth sample.
extern "C" __global__ void WIDE channel_score_gradients(
    real* __restrict__ scores, const real* __restrict__ channel_logits,
    const int64* __restrict__ labels, const real* __restrict__ log_sum_ti,
    const real* __restrict__ c_ti, int64 n_samples, int64 first_t, int64 first_i, int64 n_columns,
    int64 n, int64 k, double* __restrict__ sums_ij) {
    __shared__ double partial[8][33];
    const int64 column = int64(blockIdx.x) * 32 + threadIdx.x;
    double mine = 0;
    if (column < n_columns) {
        const int64 i_of_tile = divided(column, k);
        const int64 i = first_i + i_of_tile, j = column - i_of_tile * k;
        const real b = channel_logits[first_i * k + column], one_of_n = real(1) / real(n);
        for (int64 first = threadIdx.y; first < n_samples; first += 8 * AT_ONCE) {
            real score[AT_ONCE];
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) {
                const int64 row = first + 8 * m;
                if (row < n_samples) score[m] = scores[row * n_columns + column];
            }
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) {
                const int64 row = first + 8 * m, t = first_t + row;
                if (row >= n_samples) break;
                const real theta = exp((score[m] + b) - log_sum_ti[t * k + i]);  // Eq. 8
                const real g = c_ti[t * k + i] * (theta - real(j == labels[t])) * one_of_n;
                scores[row * n_columns + column] = g;
                mine += double(g);
            }
        }
    }
    partial[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y != 0 || column >= n_columns) return;
    for (int y = 1; y < 8; ++y) mine += partial[y][threadIdx.x];
    sums_ij[first_i * k + column] += mine;
}
