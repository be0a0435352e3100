// A counting sort of the samples by label, stable, and the mean over samples.

// counts_jb[j, b] = how many samples of chunk b have label j. Integers: the order of the additions
// cannot be seen.
extern "C" __global__ void count_labels(const int64* labels, int64 n, int64 k, int64 chunk,
                                        int64 n_chunks, unsigned long long* counts_jb) {
    const int64 t = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (t < n) atomicAdd(&counts_jb[group_of(labels[t], k) * n_chunks + t / chunk], 1ULL);
}

struct alignas(16) Four {
    int of[4];
};

// order = the samples, sorted by label; ends_jb is the running sum of counts_jb. A sample's place
// is the start of its label and chunk, plus how many before it in the chunk have the same label. A
// block holds 256 samples of one chunk, which is a multiple of 256.
extern "C" __global__ void place_samples(const int64* labels, int64 n, int64 k, int64 chunk,
                                         int64 n_chunks, const int64* ends_jb, int64* order) {
    __shared__ Four tile[64];
    int* const tile_t = tile[0].of;
    const int64 own_tile = int64(blockIdx.x) * 256, t = own_tile + threadIdx.x;
    const int64 b = own_tile / chunk;
    const int mine = t < n ? group_of(labels[t], k) : -1;
    int before = 0;
    for (int64 first = b * chunk; first < own_tile; first += 256) {
        __syncthreads();
        tile_t[threadIdx.x] = group_of(labels[first + threadIdx.x], k);
        __syncthreads();
#pragma unroll 8
        for (int f = 0; f < 64; ++f) {
            const Four four = tile[f];
#pragma unroll
            for (int other = 0; other < 4; ++other) before += four.of[other] == mine;
        }
    }
    __syncthreads();
    tile_t[threadIdx.x] = mine;
    __syncthreads();
    for (unsigned other = 0; other < threadIdx.x; ++other) before += tile_t[other] == mine;
    if (t >= n) return;
    const int64 cell = mine * n_chunks + b;
    order[(cell == 0 ? 0 : ends_jb[cell - 1]) + before] = t;
}

// The same for up to 1023 classes in two launches, for so few chunks that each block can read all of
// their counts: here, and by place_samples_of_chunk.
extern "C" __global__ void WIDE count_chunk(const int64* labels, int64 n, int64 k, Pair* counts_bj) {
    __shared__ int counts[CHUNK];
    const int64 t = int64(blockIdx.x) * CHUNK + threadIdx.x;
    counts[threadIdx.x] = 0;
    __syncthreads();
    if (t < n) atomicAdd(&counts[group_of(labels[t], k)], 1);
    __syncthreads();
    const int j = 2 * threadIdx.x;
    if (j < CHUNK)
        counts_bj[blockIdx.x * PAIRS + threadIdx.x] = counts[j] | Pair(counts[j + 1]) << 16;
}

extern "C" __global__ void WIDE place_chunk(const int64* labels, int64 n, int64 k, int64 n_chunks,
                                            const Pair* counts_bj, int64* ends_j, int64* order) {
    __shared__ Places places;
    place_samples_of_chunk(labels, n, k, n_chunks, counts_bj, ends_j, order, places);
}

// The same for up to 1024 samples: a sample's place is how many come before it. Each block finds that
// for all of them, then where its own 4096 labels end; the first writes the order.
extern "C" __global__ void WIDE sort_few(const int64* labels, int64 n, int64 k, int64* ends_j,
                                         int64* order) {
    __shared__ int label_t[1024], sorted[1024];
    const int t = threadIdx.x, n_few = int(n);
    const int mine = t < n_few ? group_of(labels[t], k) : 0;
    label_t[t] = mine;
    __syncthreads();
    if (t < n_few) {
        int before = 0;
#pragma unroll 8
        for (int other = 0; other < t; ++other) before += label_t[other] <= mine;
#pragma unroll 8
        for (int other = t + 1; other < n_few; ++other) before += label_t[other] < mine;
        sorted[before] = mine;
        if (blockIdx.x == 0) order[before] = t;
    }
    __syncthreads();
    const int64 first = int64(blockIdx.x) * 4096;
    for (int64 j = first + t; j <= k && j < first + 4096; j += blockDim.x) {
        int begin = 0, end = n_few;  // how many have a label up to j, by bisection
        while (begin < end) {
            const int middle = (begin + end) / 2;
            if (sorted[middle] <= j) begin = middle + 1;
            else end = middle;
        }
        ends_j[j] = begin;
    }
}

// nll = -mean_t log p_t, summed in float64 by one block of 1024 threads: by 16 bytes, and several at a
// time, for one multiprocessor waits long for each. With the step known when this is compiled, the
// loads are put in front of the sums.
extern "C" __global__ void WIDE negative_mean(const real* log_p_t, int64 n, real* nll) {
    const bool aligned = reinterpret_cast<unsigned long long>(log_p_t) % 16 == 0;
    const int64 n_packs = aligned ? n / PACK : 0;
    const Pack* const packs = reinterpret_cast<const Pack*>(log_p_t);
    double mine = 0;
#pragma unroll 8
    for (int64 at = threadIdx.x; at < n_packs; at += 1024) {
        const Pack pack = packs[at];
        double sum = 0;
#pragma unroll
        for (int m = 0; m < PACK; ++m) sum += double(pack.of[m]);
        mine += sum;
    }
#pragma unroll 4
    for (int64 t = n_packs * PACK + threadIdx.x; t < n; t += 1024) mine += double(log_p_t[t]);
    const double sum = row_sum(mine);
    if (threadIdx.x == 0) *nll = real(-sum / double(n));
}
