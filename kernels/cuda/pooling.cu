// Max-pooling, what follows a convolution backwards, and sums over parts.

// The largest number of each pool x pool window and which it was, in row order; then dropout, unless
// `least` is 0. Sizes of the result are out_rows, out_columns.
extern "C" __global__ void max_pool(const real* images, int64 n_out, int64 rows, int64 columns,
                                    int64 channels, int64 pool, int64 out_rows, int64 out_columns,
                                    int64 key_1, int64 key_2, int64 least, real factor, real* out,
                                    unsigned char* place) {
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
    if (least) best = is_kept(at, key_1, key_2, least) ? best * factor : real(0);
    out[at] = best;
    place[at] = (unsigned char)(number);
}

// Send the gradient after pooling, ReLU and dropout back to the pixels: where a maximum was (place;
// without meaning if pool is 1) and out is positive, times factor; zero elsewhere. `out` may be
// null: then there was no ReLU. Images are rows x columns, channels of them, windows
// out_rows x out_columns. A block has 32 channels and, in blockIdx.x, a part of the pixels; the sum
// of what they receive goes to parts (part, channel), if that is not null.
extern "C" __global__ void unpool(const real* out, const unsigned char* place, const real* d_out,
                                  int64 n_pixels, int64 rows, int64 columns, int64 channels,
                                  int64 pool, int64 out_rows, int64 out_columns, real factor,
                                  int64 part_pixels, real* d_values, double* parts) {
    __shared__ double sums[8][32];
    const int64 c = int64(blockIdx.y) * 32 + threadIdx.x;
    const int64 first = blockIdx.x * part_pixels;
    const int64 last = first + part_pixels < n_pixels ? first + part_pixels : n_pixels;
    double sum = 0;
    if (c < channels) {
#pragma unroll 4
        for (int64 pixel = first + threadIdx.y; pixel < last; pixel += 8) {
            int64 window = pixel;
            bool is_there = true;
            int number = 0;
            if (pool > 1) {
                const int64 line = divided(pixel, columns), t = divided(line, rows);
                const unsigned row = unsigned(line - t * rows);
                const unsigned column = unsigned(pixel - line * columns);
                const unsigned y = row / unsigned(pool), x = column / unsigned(pool);
                is_there = y < out_rows && x < out_columns;
                number = int((row - y * pool) * pool + column - x * pool);
                window = (t * out_rows + y) * out_columns + x;
            }
            const int64 at = window * channels + c;
            real d = 0;
            if (is_there && (pool == 1 || place[at] == number) && (!out || out[at] > 0))
                d = d_out[at] * factor;
            d_values[pixel * channels + c] = d;
            sum += double(d);
        }
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
