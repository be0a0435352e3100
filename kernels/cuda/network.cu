// What a network needs beside matrix products: bias + ReLU + dropout, sums, batches, and Adam.
//
// Where it can, a thread takes 16 bytes at once. Numbers that are the same for all come as double,
// which costs the caller nothing, and are rounded here.

__device__ inline bool is_aligned(const void* pointer) {
    return reinterpret_cast<unsigned long long>(pointer) % sizeof(Pack) == 0;
}

// Some numbers of a flat array, PACK of them but at its end, from an index that PACK divides.
__device__ inline Pack loaded(const real* values, int64 first, int count) {
    if (count == PACK && is_aligned(values)) return *reinterpret_cast<const Pack*>(values + first);
    Pack pack;
#pragma unroll
    for (int u = 0; u < PACK; ++u) pack.of[u] = u < count ? values[first + u] : real(0);
    return pack;
}

__device__ inline void store(real* values, int64 first, int count, const Pack& pack) {
    if (count == PACK && is_aligned(values)) {
        *reinterpret_cast<Pack*>(values + first) = pack;
        return;
    }
#pragma unroll
    for (int u = 0; u < PACK; ++u)
        if (u < count) values[first + u] = pack.of[u];
}

__device__ inline int64 my_element() { return int64(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ inline int pack_size(int64 first, int64 size) {
    return size - first < PACK ? int(size - first) : PACK;
}

// place / length; a division of 64 bits takes several times as long as one of 32.
__device__ inline int64 row_of(int64 place, int64 length) {
    if ((place | length) >> 32 == 0) return unsigned(place) / unsigned(length);
    return place / length;
}

// kept[e] = whether dropout keeps the number at index e.
extern "C" __global__ void dropout_kept(bool* kept, int64 size, int64 least,
                                        int64 seed_number, const int64* seed_at) {
    const int64 e = my_element(), seed = seed_of(seed_number, seed_at);
    if (e < size) kept[e] = is_kept(e, seed, seed >> 32, least);
}

// values (n, m) = max(values + bias, 0) * factor where kept, else 0.
extern "C" __global__ void bias_relu_dropout(real* values, const real* bias, int64 size, int64 m,
                                             double factor, int64 least, int64 seed_number,
                                             const int64* seed_at) {
    const int64 first = my_element() * PACK;
    if (first >= size) return;
    const int64 seed = seed_of(seed_number, seed_at);
    const int count = pack_size(first, size);
    Pack pack = loaded(values, first, count);
    int64 j = first - row_of(first, m) * m;
#pragma unroll
    for (int u = 0; u < PACK; ++u) {
        if (u == count) break;
        const real value = pack.of[u] + bias[j];
        // Without dropout (least is 0) everything is kept: no hash
        const bool kept = least == 0 || is_kept(first + u, seed, seed >> 32, least);
        pack.of[u] = value > 0 && kept ? value * real(factor) : real(0);
        if (++j == m) j = 0;
    }
    store(values, first, count, pack);
}

// Thread (x, y) of a block of (32, 32) brings a part of column x's sum; the first thread of each
// warp y gets the whole sum of column y. Always in the same order.
__device__ inline double sum_of_column(double mine) {
    __shared__ double sums[32][33];
    sums[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    return warp_sum(sums[threadIdx.x][threadIdx.y]);
}

// The sums over the rows of values (n, m), in float64; blocks of (32, 32) own 32 columns and `part`
// rows. Where there is more than one part they go to sums_pj, else to sums.
//
// With relu_out the numbers are first turned into the gradient before bias, ReLU and dropout, which
// is written to d_values; that may be the array of values.
extern "C" __global__ void WIDE column_sums(const real* values, const real* relu_out,
                                            real* d_values, real* sums, double* sums_pj, int64 n,
                                            int64 m, int64 part, double factor) {
    const int AT_ONCE = 8;  // rows that a thread reads before it writes: writing may change values
    const int64 column = int64(blockIdx.x) * 32 + threadIdx.x;
    const int64 first = int64(blockIdx.y) * part;
    const int64 last = first + part < n ? first + part : n;
    double mine = 0;
    if (column < m) {
        for (int64 t = first + threadIdx.y; t < last; t += 32 * AT_ONCE) {
            real d[AT_ONCE];
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u) {
                const int64 at = (t + 32 * u) * m + column;
                const bool inside = t + 32 * u < last;
                d[u] = inside ? values[at] : real(0);
                if (relu_out)
                    d[u] = inside && relu_out[at] > 0 ? d[u] * real(factor) : real(0);
            }
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u) {
                if (d_values && t + 32 * u < last) d_values[(t + 32 * u) * m + column] = d[u];
                mine += double(d[u]);
            }
        }
    }
    const double sum = sum_of_column(mine);
    const int64 j = int64(blockIdx.x) * 32 + threadIdx.y;
    if (threadIdx.x != 0 || j >= m) return;
    if (sums_pj) sums_pj[int64(blockIdx.y) * m + j] = sum;
    else sums[j] = real(sum);
}

// sums[j] = the sum over the parts; blocks of (32, 32).
extern "C" __global__ void WIDE sum_of_parts(const double* sums_pj, int64 n_parts, int64 m,
                                             real* sums) {
    const int64 column = int64(blockIdx.x) * 32 + threadIdx.x;
    double mine = 0;
    if (column < m) {
#pragma unroll 4
        for (int64 p = threadIdx.y; p < n_parts; p += 32) mine += sums_pj[p * m + column];
    }
    const double sum = sum_of_column(mine);
    const int64 j = int64(blockIdx.x) * 32 + threadIdx.y;
    if (threadIdx.x == 0 && j < m) sums[j] = real(sum);
}

// out[b] = values[rows[b]], rows of row_bytes bytes; a number out of range is clipped. A thread
// copies 16 bytes, at once if all rows start at a multiple of 16.
extern "C" __global__ void gather_rows(const char* values, const int64* rows, char* out, int64 n,
                                       int64 n_rows, int64 row_bytes) {
    const int64 packs = (row_bytes + PACK_BYTES - 1) / PACK_BYTES;
    const int64 e = my_element();
    if (e >= n_rows * packs) return;
    const int64 b = row_of(e, packs), first = (e - b * packs) * PACK_BYTES;
    const int64 row = rows[b] < 0 ? 0 : rows[b] < n ? rows[b] : n - 1;
    const char* from = values + row * row_bytes + first;
    char* to = out + b * row_bytes + first;
    const int count = row_bytes - first < PACK_BYTES ? int(row_bytes - first) : PACK_BYTES;
    const unsigned long long both = reinterpret_cast<unsigned long long>(from) |
                                    reinterpret_cast<unsigned long long>(to) |
                                    (unsigned long long)(count);
    if (both % 16 == 0) {
        *reinterpret_cast<Pack*>(to) = *reinterpret_cast<const Pack*>(from);
    } else if (both % 4 == 0) {
        for (int u = 0; u < count; u += 4)
            *reinterpret_cast<int*>(to + u) = *reinterpret_cast<const int*>(from + u);
    } else {
        for (int u = 0; u < count; ++u) to[u] = from[u];
    }
}

// One step of Adam. The step size may have factors of its own, n_factors: 1 or as many as
// parameters. The two corrections are read from memory where that is given.
extern "C" __global__ void adam_update(real* parameters, const real* gradient, real* mean,
                                       real* square, const real* factors, int64 size,
                                       int64 n_factors, double keep_1, double keep_2, double step,
                                       double epsilon, double correct_1, double correct_2,
                                       const double* corrections) {
    const int64 first = my_element() * PACK;
    if (first >= size) return;
    if (corrections) {
        correct_1 = corrections[0];
        correct_2 = corrections[1];
    }
    const int count = pack_size(first, size);
    Pack p = loaded(parameters, first, count), m = loaded(mean, first, count);
    Pack v = loaded(square, first, count);
    const Pack g = loaded(gradient, first, count);
#pragma unroll
    for (int u = 0; u < PACK; ++u) {
        if (u == count) break;
        real own = real(step);
        if (factors) own *= factors[n_factors == 1 ? 0 : first + u];
        m.of[u] += real(keep_1) * (g.of[u] - m.of[u]);
        v.of[u] += real(keep_2) * (g.of[u] * g.of[u] - v.of[u]);
        p.of[u] -= own * (m.of[u] * real(correct_1)) /
                   (sqrt(v.of[u] * real(correct_2)) + real(epsilon));
    }
    store(parameters, first, count, p);
    store(mean, first, count, m);
    store(square, first, count, v);
}
