// Samples sorted by label, a chunk of 1024 for each block: for labels.cu, and for kernels that have
// blocks to spare for it.

__device__ inline int group_of(int64 label, int64 k) { return int(is_class(label, k) ? label : k); }

const int CHUNK = 1024;     // samples, threads, and more than there are classes
const int CHUNK_PARTS = 4;  // their warps take places side by side
const int PART_WARPS = CHUNK / 32 / CHUNK_PARTS;

struct Places {
    int running[2][CHUNK];            // sums over the labels
    int next_pj[CHUNK_PARTS][CHUNK];  // the next place of part p's samples of label j
};

// order = the samples, sorted by label, and ends_j where each label ends in it. counts_bj says how
// many samples of chunk b have label j. By 1024 threads of block b: each has a sample and a label.
__device__ inline void place_samples_of_chunk(const int64* labels, int64 n, int64 k, int64 n_chunks,
                                              const int* counts_bj, int64* ends_j, int64* order,
                                              Places& places) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, own_chunk = blockIdx.x;
    const int warp = thread / 32 % PART_WARPS;
    int* const next_j = places.next_pj[thread / 32 / PART_WARPS];
    const int64 t = int64(own_chunk) * CHUNK + thread;
    const int mine = t < n ? group_of(labels[t], k) : -1;
    int total = 0, in_earlier_chunks = 0;
    if (thread <= k) {
#pragma unroll 16
        for (int b = 0; b < int(n_chunks); ++b) {
            const int count = counts_bj[b * (k + 1) + thread];
            total += count;
            if (b < own_chunk) in_earlier_chunks += count;
        }
    }
#pragma unroll
    for (int part = 0; part < CHUNK_PARTS; ++part) places.next_pj[part][thread] = 0;
    places.running[0][thread] = total;
    __syncthreads();
    if (mine >= 0) atomicAdd(&next_j[mine], 1);
    int now = 0;
    for (int step = 1; step < CHUNK; step *= 2) {
        const int earlier = thread >= step ? places.running[now][thread - step] : 0;
        places.running[1 - now][thread] = places.running[now][thread] + earlier;
        now = 1 - now;
        __syncthreads();
    }
    const int end = places.running[now][thread];
    if (own_chunk == 0 && thread <= k) ends_j[thread] = end;
    int next = end - total + in_earlier_chunks;
#pragma unroll
    for (int part = 0; part < CHUNK_PARTS; ++part) {
        const int count = places.next_pj[part][thread];
        places.next_pj[part][thread] = next;
        next += count;
    }
    // The warps of a part take their places one after the other; within one, the samples before it
    // count.
    const unsigned same = __match_any_sync(ALL_LANES, mine);
    const int before = __popc(same & ((1u << thread % 32) - 1));
    int place = 0;
    for (int turn = 0; turn < PART_WARPS; ++turn) {
        __syncthreads();
        if (turn != warp) continue;
        if (mine >= 0) place = next_j[mine] + before;
        __syncwarp();
        if (mine >= 0 && before == 0) next_j[mine] = place + __popc(same);
    }
    if (mine >= 0) order[place] = t;
}
