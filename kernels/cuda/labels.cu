// A counting sort of the samples by label, stable, and the mean over samples.

// counts_jb[j, b] = how many samples of chunk b have label j. Integers: the order of the additions
// cannot be seen. A label out of range belongs to no group.
extern "C" __global__ void count_labels(const int64* labels, int64 n, int64 k, int64 chunk,
                                        int64 n_chunks, unsigned long long* counts_jb) {
    const int64 t = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (t >= n || !is_class(labels[t], k)) return;
    atomicAdd(&counts_jb[labels[t] * n_chunks + t / chunk], 1ULL);
}

// order = the samples, sorted by label; ends_jb is the running sum of counts_jb. A sample's place
// is the start of its label and chunk, plus how many before it in the chunk have the same label. A
// block holds 256 samples of one chunk, which is a multiple of 256.
extern "C" __global__ void place_samples(const int64* labels, int64 n, int64 k, int64 chunk,
                                         int64 n_chunks, const int64* ends_jb, int64* order) {
    __shared__ int64 tile[256];
    const int64 t = int64(blockIdx.x) * 256 + threadIdx.x;
    const int64 b = int64(blockIdx.x) * 256 / chunk;
    const int64 mine = t < n ? labels[t] : -1;
    const int64 own_tile = int64(blockIdx.x) * 256;
    int64 before = 0;
    for (int64 first = b * chunk; first <= own_tile; first += 256) {
        __syncthreads();
        tile[threadIdx.x] = first + threadIdx.x < n ? labels[first + threadIdx.x] : -1;
        __syncthreads();
        const int length = first < own_tile ? 256 : int(threadIdx.x);
        for (int other = 0; other < length; ++other) before += tile[other] == mine;
    }
    if (t >= n || !is_class(mine, k)) return;
    const int64 cell = mine * n_chunks + b;
    order[(cell == 0 ? 0 : ends_jb[cell - 1]) + before] = t;
}

// nll = -mean_t log p_t, summed in float64 by one block.
extern "C" __global__ void WIDE negative_mean(
    const real* log_p_t, int64 n, real* nll) {
    double mine = 0;
#pragma unroll 4
    for (int64 t = threadIdx.x; t < n; t += blockDim.x) mine += double(log_p_t[t]);
    const double sum = row_sum(mine);
    if (threadIdx.x == 0) *nll = real(-sum / double(n));
}
