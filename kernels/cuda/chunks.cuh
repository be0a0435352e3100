// Samples sorted by label, a chunk of 1024 for each block: for labels.cu, and for kernels that have
// blocks to spare for it.

__device__ inline int group_of(int64 label, int64 k) { return int(is_class(label, k) ? label : k); }

const int CHUNK = 1024;     // samples, threads, and more than there are classes
const int CHUNK_PARTS = 4;  // their warps take places side by side
const int PART_WARPS = CHUNK / 32 / CHUNK_PARTS;

// Counts of two labels, 2 j and 2 j + 1, with 16 bits each: of up to 63 chunks they are added as one
// number.
typedef unsigned Pair;
const int PAIRS = CHUNK / 2;  // of a chunk
__device__ inline int of_pair(Pair pair, int label) {
    return int(label % 2 ? pair >> 16 : pair & 0xffff);
}

struct Places {
    int next_pj[CHUNK_PARTS][CHUNK];  // the next place of part p's samples of label j
    int samples_of_warp[32];          // of the labels of a warp's threads
    Pair counts[2][PAIRS], earlier_counts[2][PAIRS];  // by each half of the threads
};

// order = the samples, sorted by label, and ends_j where each label ends in it. counts_bj says how
// many samples of chunk b have each label. By 1024 threads of block b: each has a sample and a label.
__device__ inline void place_samples_of_chunk(const int64* labels, int64 n, int64 k, int64 n_chunks,
                                              const Pair* counts_bj, int64* ends_j, int64* order,
                                              Places& places) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, own_chunk = blockIdx.x;
    const int warp = thread / 32, lane = thread % 32;
    int* const next_j = places.next_pj[warp / PART_WARPS];
    const int64 t = int64(own_chunk) * CHUNK + thread;
    const int mine = t < n ? group_of(labels[t], k) : -1;
    const int half = thread / PAIRS, pair = thread % PAIRS;
    Pair in_all = 0, in_earlier = 0;
#pragma unroll 32
    for (int b = half; b < int(n_chunks); b += 2) {
        const Pair in_chunk = counts_bj[b * PAIRS + pair];
        in_all += in_chunk;
        if (b < own_chunk) in_earlier += in_chunk;
    }
    places.counts[half][pair] = in_all;
    places.earlier_counts[half][pair] = in_earlier;
#pragma unroll
    for (int part = 0; part < CHUNK_PARTS; ++part) places.next_pj[part][thread] = 0;
    __syncthreads();
    if (mine >= 0) atomicAdd(&next_j[mine], 1);
    int total = 0, in_earlier_chunks = 0;
    for (int other = 0; other < 2; ++other) {
        total += of_pair(places.counts[other][thread / 2], thread);
        in_earlier_chunks += of_pair(places.earlier_counts[other][thread / 2], thread);
    }
    int end = total;  // where the label ends: the sum over all labels up to it
    for (int step = 1; step < 32; step *= 2) {
        const int earlier = __shfl_sync(ALL_LANES, end, lane - step & 31);
        if (lane >= step) end += earlier;
    }
    if (lane == 31) places.samples_of_warp[warp] = end;
    __syncthreads();
    end += warp_sum(lane < warp ? places.samples_of_warp[lane] : 0);
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
    const int before = __popc(same & ((1u << lane) - 1));
    int place = 0;
    for (int turn = 0; turn < PART_WARPS; ++turn) {
        __syncthreads();
        if (turn != warp % PART_WARPS) continue;
        if (mine >= 0) place = next_j[mine] + before;
        __syncwarp();
        if (mine >= 0 && before == 0) next_j[mine] = place + __popc(same);
    }
    if (mine >= 0) order[place] = t;
}
