// Convolutions as products of matrices: a row of the one is the patch of images that a pixel of the
// result sees, s * s * C numbers in the order of the weights. It is never stored: slabs of it are
// copied from the images to shared memory, zeros where there is padding, while the slab before is
// multiplied.
//
// A warp works on a tile of WARP_ROWS x 32 numbers of the result. Its lanes are 8 x 4; a lane has
// LANE_ROWS rows, 8 apart, and 8 columns.

const int VECTOR = 16 / sizeof(real);  // numbers that are copied at once, where they lie so
const int SLAB = 4 * VECTOR;           // of a patch, or pixels where these are summed over
const int LANE_ROWS = 32 / sizeof(real);
const int WARP_ROWS = 8 * LANE_ROWS;
const int LANE_VECTORS = 8 / VECTOR;         // of its columns
const int WARP_VECTORS = 4 * LANE_VECTORS;   // 32 columns
const int PITCH = SLAB / VECTOR + 1;         // so that 8 rows lie in 8 different banks
const int FAR_OUT = -(1 << 29);              // a row of pixels that is in no image

// At most 128 registers for each thread: 16 warps at a time on a multiprocessor.
#define BUSY __launch_bounds__(32, 16)
#define NARROW __launch_bounds__(64, 8)
#define BROAD __launch_bounds__(128, 4)

struct alignas(16) Vector {
    real x[VECTOR];
};

// n images of rows x columns x channels, and filters that are slid over them. The results are in
// windows of pool x pool pixels, out_rows x out_columns of them for each image.
struct Shape {
    int64 n_out;  // windows of all images
    int rows, columns, channels, size, padding, out_rows, out_columns, pool;

    __device__ int patch() const { return size * size * channels; }
};

// Where a patch starts in the images, and its row and column there: in the padding below 0 or too
// large, and then it may start outside of the images.
struct alignas(16) Pixel {
    const real* start;
    int row, column;
};

__device__ inline Pixel pixel_at(const Shape& shape, const real* images, int64 window, int number) {
    if (window >= shape.n_out) return {images, FAR_OUT, 0};
    const int64 line = divided(window, shape.out_columns), t = divided(line, shape.out_rows);
    const int row = int(line - t * shape.out_rows) * shape.pool + number / shape.pool;
    const int column = int(window - line * shape.out_columns) * shape.pool + number % shape.pool;
    const int y = row - shape.padding, x = column - shape.padding;
    return {images + ((t * shape.rows + y) * shape.columns + x) * shape.channels, y, x};
}

// A place in a patch: its number k is (row, column, channel), `offset` from where the patch starts.
struct Place {
    int row, column, channel, offset;

    __device__ Place(const Shape& shape, int k) : row(0), column(0), channel(0) {
        advance(shape, k);
    }

    __device__ void advance(const Shape& shape, int step) {
        channel += step;
        while (channel >= shape.channels) {
            channel -= shape.channels;
            if (++column == shape.size) {
                column = 0;
                ++row;
            }
        }
        offset = (row * shape.columns + column) * shape.channels + channel;
    }

    // Whether it is in the patch at all, and not in the padding. No branches: it is asked often.
    __device__ bool is_inside(const Shape& shape, const Pixel& pixel) const {
        return (row < shape.size) & (unsigned(pixel.row + row) < unsigned(shape.rows)) &
               (unsigned(pixel.column + column) < unsigned(shape.columns));
    }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define COPIES_ON_ITS_OWN  // what memory sends need not pass through registers
#endif

// Begin to copy WIDTH numbers to shared memory, or put zeros there.
template <int WIDTH>
__device__ inline void copy(real* to, const real* from, bool is_there) {
#ifdef COPIES_ON_ITS_OWN
    const unsigned shared = unsigned(__cvta_generic_to_shared(to));
    const int bytes = WIDTH * sizeof(real);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from),
                 "n"(bytes), "r"(is_there ? bytes : 0)
                 : "memory");
#else
    for (int i = 0; i < WIDTH; ++i) to[i] = is_there ? from[i] : real(0);
#endif
}

// Wait for everything that this thread copies.
__device__ inline void wait_for_copies() {
#ifdef COPIES_ON_ITS_OWN
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Whether vectors of an array, with rows of that length, can be copied at once.
__device__ inline bool is_aligned(const void* array, int length) {
    return length % VECTOR == 0 && (unsigned long long)(array) % 16 == 0;
}

// A slab of rows of a matrix (n_rows, n_columns), from row `first` on, columns from `left` on.
template <int THREADS, int TILE_COLUMNS, int WIDTH>
__device__ inline void copy_rows(const real* matrix, int64 first, int64 n_rows, int n_columns,
                                 int left, int thread, Vector* slab) {
    const int across = TILE_COLUMNS / WIDTH;
    const int column = thread % across * WIDTH, own = thread / across;
    const int64 n_left = left + column < n_columns ? n_rows - first - own : 0;
    const real* from = matrix + (first + own) * n_columns + left + column;
    real* to = (real*)slab + own * TILE_COLUMNS + column;
#pragma unroll
    for (int i = 0; i < SLAB; i += THREADS / across)
        copy<WIDTH>(to + i * TILE_COLUMNS, from + int64(i) * n_columns, i < n_left);
}

// A slab of the patches of a tile's pixels: a row for each pixel.
template <int THREADS, int TILE_ROWS, int WIDTH>
__device__ inline void copy_patches(const Shape& shape, const Pixel* pixels, const Place& place,
                                    int thread, Vector* slab) {
    const int across = SLAB / WIDTH;
    const int own = thread / across;
    real* to = (real*)slab + own * PITCH * VECTOR + thread % across * WIDTH;
    pixels += own;
#pragma unroll 8
    for (int i = 0; i < TILE_ROWS; i += THREADS / across) {
        const Pixel pixel = pixels[i];
        copy<WIDTH>(to + i * PITCH * VECTOR, pixel.start + place.offset,
                    place.is_inside(shape, pixel));
    }
}

// A lane's part of a warp's tile of the result.
struct Tile {
    real sum[LANE_ROWS][8];

    __device__ Tile() {
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r)
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[r][j] = 0;
    }

    // Add the products of LANE_ROWS numbers and 8.
    __device__ void add(const real (&a)[LANE_ROWS], const Vector (&b)[LANE_VECTORS]) {
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r)
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[r][j] += a[r] * b[j / VECTOR].x[j % VECTOR];
    }
};

// Number j of a lane's 8 columns.
__device__ inline int lane_column(unsigned lane, int j) {
    return ((j / VECTOR) * 4 + int(lane / 8)) * VECTOR + j % VECTOR;
}

// Write numbers of a row from `at` on, as far as its columns go.
__device__ inline void store(real* out, int64 at, const Vector& values, int n_left, bool aligned) {
    if (aligned) {
        if (n_left > 0) *(Vector*)(out + at) = values;
    } else {
#pragma unroll
        for (int u = 0; u < VECTOR; ++u)
            if (u < n_left) out[at + u] = values.x[u];
    }
}

// What follows a convolution: bias and ReLU (not where bias is null), max-pooling, dropout.
struct Following {
    const real* bias;
    int64 least, seed_number;
    const int64* seed_at;
    real factor;  // of what dropout keeps
};

// Write a lane's windows of GROUP pixels, which are rows of its tile one after the other. The first
// window is `window`, the others are 8 apart.
template <int GROUP>
__device__ inline void finish(Tile& tile, int64 window, int64 n_out, int left, unsigned lane,
                              int n_filters, const Following& following, real* out,
                              unsigned char* place) {
    if (following.bias) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int f = left + lane_column(lane, j);
            const real bias = f < n_filters ? following.bias[f] : real(0);
#pragma unroll
            for (int r = 0; r < LANE_ROWS; ++r) {
                const real value = tile.sum[r][j] + bias;
                tile.sum[r][j] = value > 0 ? value : real(0);  // 0 for NaN, as on the CPU
            }
        }
    }
    const bool aligned = is_aligned(out, n_filters);
    const int64 seed = seed_of(following.seed_number, following.seed_at);
#pragma unroll
    for (int g = 0; g < LANE_ROWS / GROUP; ++g) {
        const int64 row = window + 8 * g;
        if (row >= n_out) return;
#pragma unroll
        for (int j = 0; j < 8; j += VECTOR) {
            const int f = left + lane_column(lane, j), n_left = n_filters - f;
            const int64 at = row * n_filters + f;
            Vector best;
            int number[VECTOR];
#pragma unroll
            for (int u = 0; u < VECTOR; ++u) {
                best.x[u] = tile.sum[g * GROUP][j + u];
                number[u] = 0;
#pragma unroll
                for (int q = 1; q < GROUP; ++q) {
                    const real other = tile.sum[g * GROUP + q][j + u];
                    if (other > best.x[u]) {
                        best.x[u] = other;
                        number[u] = q;
                    }
                }
            }
            if (place) {
#pragma unroll
                for (int u = 0; u < VECTOR; ++u)
                    if (u < n_left) place[at + u] = (unsigned char)(number[u]);
            }
            if (following.least) {
#pragma unroll
                for (int u = 0; u < VECTOR; ++u) {
                    const bool kept = is_kept(at + u, seed, seed >> 32, following.least);
                    best.x[u] = kept ? best.x[u] * following.factor : real(0);
                }
            }
            store(out, at, best, n_left, aligned);
        }
    }
}

// A block's tile: 2 warps of rows, COLUMN_WARPS of columns. The order of its rows is such that a
// lane has whole windows.
template <int COLUMN_WARPS>
__device__ inline void convolve(const Shape& shape, const real* images, const real* weight,
                                int n_filters, const Following& following, real* out,
                                unsigned char* place) {
    const int THREADS = 64 * COLUMN_WARPS, TILE_ROWS = 2 * WARP_ROWS;
    const int TILE_COLUMNS = 32 * COLUMN_WARPS, TILE_VECTORS = TILE_COLUMNS / VECTOR;
    __shared__ Vector patches[2][TILE_ROWS * PITCH];
    __shared__ Vector filters[2][SLAB * TILE_VECTORS];
    __shared__ Pixel pixels[TILE_ROWS];
    const int thread = threadIdx.y * 32 + threadIdx.x, left = blockIdx.y * TILE_COLUMNS;
    const unsigned lane = threadIdx.x, row_warp = threadIdx.y % 2, column_warp = threadIdx.y / 2;
    const int group = shape.pool * shape.pool;  // 1, or 4
    const int warp_windows = WARP_ROWS / group;
    const int64 first = int64(blockIdx.x) * 2 * warp_windows;

    for (int row = thread; row < TILE_ROWS; row += THREADS) {
        const int lane_row = row % WARP_ROWS / 8;
        const int window = row / WARP_ROWS * warp_windows + lane_row / group * 8 + row % 8;
        pixels[row] = pixel_at(shape, images, first + window, lane_row % group);
    }

    const bool wide_images = is_aligned(images, shape.channels);
    const bool wide_weight = is_aligned(weight, n_filters);
    const int n_patch = shape.patch(), n_slabs = (n_patch + SLAB - 1) / SLAB;
    const int across = wide_images ? SLAB / VECTOR : SLAB;
    Place at(shape, thread % across * (SLAB / across));
    Tile tile;
    auto copy_slab = [&](int slab) {
        if (wide_images)
            copy_patches<THREADS, TILE_ROWS, VECTOR>(shape, pixels, at, thread, patches[slab % 2]);
        else
            copy_patches<THREADS, TILE_ROWS, 1>(shape, pixels, at, thread, patches[slab % 2]);
        if (wide_weight)
            copy_rows<THREADS, TILE_COLUMNS, VECTOR>(weight, slab * SLAB, n_patch, n_filters, left,
                                                     thread, filters[slab % 2]);
        else
            copy_rows<THREADS, TILE_COLUMNS, 1>(weight, slab * SLAB, n_patch, n_filters, left,
                                                thread, filters[slab % 2]);
        at.advance(shape, SLAB);
    };
    for (int slab = -1; slab < n_slabs; ++slab) {
        wait_for_copies();
        __syncthreads();
        if (slab + 1 < n_slabs) copy_slab(slab + 1);
        if (slab < 0) continue;
        const Vector* rows = patches[slab % 2] + (row_warp * WARP_ROWS + lane % 8) * PITCH;
        const Vector* columns = filters[slab % 2] + column_warp * WARP_VECTORS + lane / 8;
#pragma unroll
        for (int q = 0; q < SLAB / VECTOR; ++q) {
            Vector a[LANE_ROWS];
#pragma unroll
            for (int r = 0; r < LANE_ROWS; ++r) a[r] = rows[r * 8 * PITCH + q];
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                Vector b[LANE_VECTORS];
                real a_v[LANE_ROWS];
#pragma unroll
                for (int j = 0; j < LANE_VECTORS; ++j)
                    b[j] = columns[(q * VECTOR + v) * TILE_VECTORS + j * 4];
#pragma unroll
                for (int r = 0; r < LANE_ROWS; ++r) a_v[r] = a[r].x[v];
                tile.add(a_v, b);
            }
        }
    }
    const int64 window = first + row_warp * warp_windows + lane % 8;
    if (group == 1)
        finish<1>(tile, window, shape.n_out, left + column_warp * 32, lane, n_filters, following,
                  out, place);
    else
        finish<4>(tile, window, shape.n_out, left + column_warp * 32, lane, n_filters, following,
                  out, place);
}

// out = dropout(max_pool(max(convolution + bias, 0))), or the convolution alone if bias is null;
// pool is 1 or 2, place where the maxima were, or null.
extern "C" __global__ void NARROW convolve_32(
    const real* images, const real* weight, const real* bias, int64 n_out, int64 rows,
    int64 columns, int64 channels, int64 n_filters, int64 size, int64 padding, int64 out_rows,
    int64 out_columns, int64 pool, double factor, int64 least, int64 seed, const int64* seed_at,
    real* out, unsigned char* place) {
    const Shape shape = {n_out,         int(rows),     int(columns),     int(channels), int(size),
                         int(padding), int(out_rows), int(out_columns), int(pool)};
    convolve<1>(shape, images, weight, int(n_filters), {bias, least, seed, seed_at, real(factor)},
                out, place);
}

extern "C" __global__ void BROAD convolve_64(
    const real* images, const real* weight, const real* bias, int64 n_out, int64 rows,
    int64 columns, int64 channels, int64 n_filters, int64 size, int64 padding, int64 out_rows,
    int64 out_columns, int64 pool, double factor, int64 least, int64 seed, const int64* seed_at,
    real* out, unsigned char* place) {
    const Shape shape = {n_out,         int(rows),     int(columns),     int(channels), int(size),
                         int(padding), int(out_rows), int(out_columns), int(pool)};
    convolve<2>(shape, images, weight, int(n_filters), {bias, least, seed, seed_at, real(factor)},
                out, place);
}

// A part of the pixels' sum for WARP_ROWS places of a patch and TILE_COLUMNS filters. One part after
// the other is in blockIdx.y; blockIdx.x counts the tiles of the gradient.
template <int COLUMN_WARPS>
__device__ inline void weight_gradient(const Shape& shape, const real* images, const real* d_values,
                                       int n_filters, int64 part_pixels, real* parts) {
    const int THREADS = 32 * COLUMN_WARPS, TILE_COLUMNS = 32 * COLUMN_WARPS;
    const int ROW_VECTORS = WARP_ROWS / VECTOR, TILE_VECTORS = TILE_COLUMNS / VECTOR;
    __shared__ Vector patches[2][SLAB * ROW_VECTORS];
    __shared__ Vector gradients[2][SLAB * TILE_VECTORS];
    __shared__ Pixel pixels[2][32];
    const int n_across = (n_filters + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int top = blockIdx.x / n_across * WARP_ROWS, left = blockIdx.x % n_across * TILE_COLUMNS;
    const int thread = threadIdx.y * 32 + threadIdx.x, n_patch = shape.patch();
    const unsigned lane = threadIdx.x, column_warp = threadIdx.y;
    const int64 first = int64(blockIdx.y) * part_pixels;
    const int64 last = first + part_pixels < shape.n_out ? first + part_pixels : shape.n_out;
    const int n_slabs = int((last - first + SLAB - 1) / SLAB);
    const int in_table = 32 / SLAB;  // slabs whose pixels are known

    auto find_pixels = [&](int table) {
        if (threadIdx.y > 0) return;
        const int64 pixel = first + table * 32 + lane;
        pixels[table % 2][lane] = pixel_at(shape, images, pixel < last ? pixel : shape.n_out, 0);
    };
    const bool wide_images = is_aligned(images, shape.channels);
    const bool wide_gradient = is_aligned(d_values, n_filters);
    const int row_of_patch = wide_images ? thread % ROW_VECTORS * VECTOR : thread % WARP_ROWS;
    const Place fixed(shape, top + row_of_patch);
    auto copy_slab = [&](int slab) {
        const Pixel* known = pixels[slab / in_table % 2] + slab % in_table * SLAB;
        if (wide_images) {
            const int own = thread / ROW_VECTORS;
            real* to = (real*)patches[slab % 2] + own * WARP_ROWS + row_of_patch;
#pragma unroll
            for (int p = 0; p < SLAB; p += THREADS / ROW_VECTORS) {
                const Pixel pixel = known[own + p];
                copy<VECTOR>(to + p * WARP_ROWS, pixel.start + fixed.offset,
                             fixed.is_inside(shape, pixel));
            }
        } else {
            for (int row = thread; row < WARP_ROWS; row += THREADS) {
                const Place place(shape, top + row);
                real* to = (real*)patches[slab % 2] + row;
                for (int p = 0; p < SLAB; ++p)
                    copy<1>(to + p * WARP_ROWS, known[p].start + place.offset,
                            place.is_inside(shape, known[p]));
            }
        }
        if (wide_gradient)
            copy_rows<THREADS, TILE_COLUMNS, VECTOR>(d_values, first + slab * SLAB, last, n_filters,
                                                     left, thread, gradients[slab % 2]);
        else
            copy_rows<THREADS, TILE_COLUMNS, 1>(d_values, first + slab * SLAB, last, n_filters,
                                                left, thread, gradients[slab % 2]);
        // These pixels are wanted after the next barrier at the earliest, and those that they
        // replace were last read before the last one.
        if (slab % in_table == 0) find_pixels(slab / in_table + 1);
    };
    Tile tile;
    find_pixels(0);
    for (int slab = -1; slab < n_slabs; ++slab) {
        wait_for_copies();
        __syncthreads();
        if (slab + 1 < n_slabs) copy_slab(slab + 1);
        if (slab < 0) continue;
        const Vector* rows = patches[slab % 2] + lane % 8;
        const Vector* columns = gradients[slab % 2] + column_warp * WARP_VECTORS + lane / 8;
#pragma unroll
        for (int p = 0; p < SLAB; ++p) {
            real a[LANE_ROWS];
            Vector b[LANE_VECTORS];
#pragma unroll
            for (int i = 0; i < LANE_ROWS / VECTOR; ++i) {
                const Vector some = rows[p * ROW_VECTORS + i * 8];
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) a[i * VECTOR + v] = some.x[v];
            }
#pragma unroll
            for (int j = 0; j < LANE_VECTORS; ++j) b[j] = columns[p * TILE_VECTORS + j * 4];
            tile.add(a, b);
        }
    }
    parts += int64(blockIdx.y) * n_patch * n_filters;
    const bool aligned = is_aligned(parts, n_filters);
#pragma unroll
    for (int r = 0; r < LANE_ROWS; ++r) {
        const int row = top + (r / VECTOR * 8 + int(lane % 8)) * VECTOR + r % VECTOR;
        if (row >= n_patch) continue;
#pragma unroll
        for (int j = 0; j < 8; j += VECTOR) {
            const int f = left + column_warp * 32 + lane_column(lane, j);
            Vector values;
#pragma unroll
            for (int u = 0; u < VECTOR; ++u) values.x[u] = tile.sum[r][j + u];
            store(parts, int64(row) * n_filters + f, values, n_filters - f, aligned);
        }
    }
}

extern "C" __global__ void BUSY weight_gradient_32(
    const real* images, const real* d_values, int64 n_out, int64 rows, int64 columns,
    int64 channels, int64 n_filters, int64 size, int64 padding, int64 out_rows, int64 out_columns,
    int64 part_pixels, real* parts) {
    const Shape shape = {n_out,         int(rows),     int(columns),     int(channels), int(size),
                         int(padding), int(out_rows), int(out_columns), 1};
    weight_gradient<1>(shape, images, d_values, int(n_filters), part_pixels, parts);
}

extern "C" __global__ void NARROW weight_gradient_64(
    const real* images, const real* d_values, int64 n_out, int64 rows, int64 columns,
    int64 channels, int64 n_filters, int64 size, int64 padding, int64 out_rows, int64 out_columns,
    int64 part_pixels, real* parts) {
    const Shape shape = {n_out,         int(rows),     int(columns),     int(channels), int(size),
                         int(padding), int(out_rows), int(out_columns), 1};
    weight_gradient<2>(shape, images, d_values, int(n_filters), part_pixels, parts);
}

// turned[a, b, f, c] = weight[s-1-a, s-1-b, c, f]: with these filters a convolution of the
// gradient gives that of the images.
extern "C" __global__ void turn_filters(const real* weight, int64 n_places, int64 channels,
                                        int64 n_filters, real* turned) {
    const int64 at = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n_places * channels * n_filters) return;
    const int64 c = at % channels, f = at / channels % n_filters;
    const int64 ab = n_places - 1 - at / (channels * n_filters);
    turned[at] = weight[(ab * channels + c) * n_filters + f];
}
