// Max-pooling, what follows a convolution backwards, and sums over parts.

// The largest number of each pool x pool window and which it was, in row order; then dropout, unless
// `least` is 0. Sizes of the result are out_rows, out_columns.
extern "C" __global__ void max_pool(const real* images, int64 n_out, int64 rows, int64 columns,
                                    int64 channels, int64 pool, int64 out_rows, int64 out_columns,
                                    double factor, int64 least, int64 seed_number,
                                    const int64* seed_at, real* out, unsigned char* place) {
    const int64 at = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n_out) return;
    const int64 window = divided(at, channels), c = at - window * channels;
    const int64 line = divided(window, out_columns), t = divided(line, out_rows);
    const int64 y = (line - t * out_rows) * pool, x = (window - line * out_columns) * pool;
    const real* corner = images + ((t * rows + y) * columns + x) * channels + c;
    real best = corner[0];
    int number = 0;
    for (int a = 0; a < pool; ++a) {
        for (int b = 0; b < pool; ++b) {
            const real other = corner[(a * columns + b) * channels];
            if (other > best) {
                best = other;
                number = a * int(pool) + b;
            }
        }
    }
    if (least) {
        const int64 seed = seed_of(seed_number, seed_at);
        best = is_kept(at, seed, seed >> 32, least) ? best * real(factor) : real(0);
    }
    out[at] = best;
    place[at] = (unsigned char)(number);
}

// Where the gradient of a pixel comes from.
struct Windows {
    int64 rows, columns, channels;  // of the images
    int64 pool, out_rows, out_columns;
    const real* out;
    const unsigned char* place;
    const real* d_out;
    real factor;

    // The window and channel that a pixel gets its gradient from, -1 if it is in none, and which
    // number of the window it is.
    template <bool POOLED>
    __device__ int64 source(int64 pixel, int64 c, int& number) const {
        number = 0;
        if (!POOLED) return pixel * channels + c;
        const int64 line = divided(pixel, columns), t = divided(line, rows);
        const unsigned row = unsigned(line - t * rows), column = unsigned(pixel - line * columns);
        const unsigned side = unsigned(pool), y = row / side, x = column / side;
        number = int((row - y * side) * side + column - x * side);
        const bool is_inside = (y < out_rows) & (x < out_columns);
        return is_inside ? ((t * out_rows + y) * out_columns + x) * channels + c : -1;
    }

    // Write the gradients of some pixels, those from `first` on, 8 apart, and return their sum.
    template <bool POOLED>
    __device__ double write(int64 first, int64 last, int64 c, real* d_values) const {
        const int AT_ONCE = 4;  // are read before any is written
        double sum = 0;
        for (int64 pixel = first; pixel < last; pixel += 8 * AT_ONCE) {
            int64 at[AT_ONCE];
            int number[AT_ONCE];
            real d[AT_ONCE];
            bool is_kept[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                at[i] = source<POOLED>(pixel + 8 * i, c, number[i]);
                if (pixel + 8 * i >= last) at[i] = -1;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) d[i] = at[i] >= 0 ? d_out[at[i]] : real(0);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                is_kept[i] = !POOLED | ((POOLED & (at[i] >= 0) ? place[at[i]] : 0) == number[i]);
            if (out) {
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    is_kept[i] &= (at[i] >= 0 ? out[at[i]] : real(0)) > 0;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                d[i] = is_kept[i] ? d[i] * factor : real(0);
                sum += double(d[i]);
                if (pixel + 8 * i < last) d_values[(pixel + 8 * i) * channels + c] = d[i];
            }
        }
        return sum;
    }
};

// Send the gradient after pooling, ReLU and dropout back to the pixels: where a maximum was (place;
// without meaning if pool is 1) and out is positive, times factor; zero elsewhere. `out` may be
// null: then there was no ReLU. A block has 32 channels and, in blockIdx.x, a part of the pixels;
// the sum of what they receive goes to parts (part, channel), if that is not null.
extern "C" __global__ void unpool(const real* out, const unsigned char* place, const real* d_out,
                                  int64 n_pixels, int64 rows, int64 columns, int64 channels,
                                  int64 pool, int64 out_rows, int64 out_columns, double factor,
                                  int64 part_pixels, real* d_values, double* parts) {
    __shared__ double sums[8][32];
    const Windows windows = {rows, columns, channels, pool,  out_rows, out_columns,
                             out,  place,   d_out,    real(factor)};
    const int64 c = int64(blockIdx.y) * 32 + threadIdx.x;
    const int64 first = blockIdx.x * part_pixels;
    const int64 last = first + part_pixels < n_pixels ? first + part_pixels : n_pixels;
    double sum = 0;
    if (c < channels) {
        sum = pool > 1 ? windows.write<true>(first + threadIdx.y, last, c, d_values)
                       : windows.write<false>(first + threadIdx.y, last, c, d_values);
    }
    if (!parts) return;
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= channels) return;
    for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
    parts[int64(blockIdx.x) * channels + c] = sum;
}

// sum_e = sum over parts of parts[p, e], in float64 and always in the same order: 32 numbers for
// each block, 32 threads for each number.
template <class Part>
__device__ inline void add_parts(const Part* parts, int64 n_parts, int64 size, int64 block,
                                 real* sum) {
    __shared__ double sums[32][33];
    const int64 e = block * 32 + threadIdx.x;
    double mine = 0;
    if (e < size) {
#pragma unroll 8
        for (int64 p = threadIdx.y; p < n_parts; p += 32) mine += double(parts[p * size + e]);
    }
    sums[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y > 0 || e >= size) return;
    for (int i = 1; i < 32; ++i) mine += sums[i][threadIdx.x];
    sum[e] = real(mine);
}

// The gradients of weight and bias. The first blocks work on the weight, the others on the bias.
extern "C" __global__ void WIDE add_gradients(const real* weight_parts, int64 n_weight_parts,
                                              int64 n_weight, real* d_weight,
                                              const double* bias_parts, int64 n_bias_parts,
                                              int64 n_bias, real* d_bias) {
    const int64 n_blocks = (n_weight + 31) / 32;
    if (blockIdx.x < n_blocks)
        add_parts(weight_parts, n_weight_parts, n_weight, blockIdx.x, d_weight);
    else
        add_parts(bias_parts, n_bias_parts, n_bias, blockIdx.x - n_blocks, d_bias);
}
