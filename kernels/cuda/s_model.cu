// The s-model. Column z of log theta is all that a sample needs of the noise layer, so log theta is
// transposed first and a column becomes a contiguous row.

// A block of (32, 32) threads has 16 rows of B, two warps for each, which take turns: the first has 32
// columns, the second the next 32, and so on.
const int THETA_ROWS = 16, THETA_WARPS = 32 / THETA_ROWS;
const int THETA_PARTS = 4;  // of a piece: columns of a thread
const int THETA_PIECE = 32 * THETA_WARPS * THETA_PARTS;
const int THETA_HELD = 4096 / sizeof(real);
typedef real Piece[THETA_PIECE][THETA_ROWS + 1];

// The thread's column m.
__device__ inline int theta_column(int m) {
    return 32 * (THETA_WARPS * m + threadIdx.y % THETA_WARPS) + threadIdx.x;
}

// The thread's numbers of a row of B from first_j on; -inf beyond the end.
template <int SIZE>
__device__ inline void load_columns(const real* b_j, int64 first_j, int64 length, real (&b)[SIZE]) {
#pragma unroll
    for (int m = 0; m < SIZE; ++m) {
        const int64 j = first_j + theta_column(m);
        b[m] = j < length ? b_j[j] : minus_infinity();
    }
}

// Turn a piece of log theta: the thread's numbers b of a row of B become columns from first_j on.
__device__ inline void turn_piece(const real* b, LogSum all, real log_sum, int64 first_i,
                                  int64 first_j, int64 k, Piece& piece, real* log_theta_ji) {
    const int row = threadIdx.x % THETA_ROWS, column = (threadIdx.y * 32 + threadIdx.x) / THETA_ROWS;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < THETA_PARTS; ++m)
        piece[theta_column(m)][threadIdx.y / THETA_WARPS] = (b[m] - all.top) - log_sum;
    __syncthreads();
#pragma unroll
    for (int at = 0; at < THETA_PIECE; at += 1024 / THETA_ROWS) {
        const int64 i = first_i + row, j = first_j + at + column;
        if (i < k && j < k) log_theta_ji[j * k + i] = piece[at + column][row];
    }
}

// log theta_ji = log theta_ij, and the two parts of each row's log-sum-exp:
// log theta_ij = (B_ij - top_i) - log_sum_i (Eq. 10). Rows of B are turned by pieces; those of up to
// 4 KiB stay in registers meanwhile.
//
// The first n_chunks blocks sort the samples instead, at the same time.
extern "C" __global__ void WIDE log_theta_columns(
    const real* channel_logits, int64 k, real* top_i, real* log_sum_i, real* log_theta_ji,
    const int64* labels, int64 n, int64 n_chunks, const Pair* counts_bj, int64* ends_j, int64* order) {
    __shared__ union {
        Piece piece;
        Places places;
    } memory;
    __shared__ LogSum sum_of_warp[32];
    if (blockIdx.x < n_chunks) {
        place_samples_of_chunk(labels, n, k, n_chunks, counts_bj, ends_j, order, memory.places);
        return;
    }
    const int64 first_i = (blockIdx.x - n_chunks) * THETA_ROWS, i = first_i + threadIdx.y / THETA_WARPS;
    const real* const b_j = channel_logits + i * k;
    const int64 length = i < k ? k : 0;
    const bool is_held = k <= THETA_HELD;
    LogSum all = nothing_yet();
    real held[THETA_HELD / 32 / THETA_WARPS];
    if (is_held) {
        load_columns(b_j, 0, length, held);
        all.add_all(held);
    } else {
        for (int64 first_j = 0; first_j < length; first_j += THETA_PIECE) {
            real b[THETA_PARTS];
            load_columns(b_j, first_j, length, b);
            all.add_all(b);
        }
    }
    all = warp_log_sum(all);
    if (threadIdx.x == 0) sum_of_warp[threadIdx.y] = all;
    __syncthreads();
    all = joined(all, sum_of_warp[threadIdx.y ^ 1]);
    const real log_sum = log(all.sum);
    if (length && threadIdx.x == 0 && threadIdx.y % THETA_WARPS == 0) {
        top_i[i] = all.top;
        log_sum_i[i] = log_sum;
    }
    if (is_held) {
#pragma unroll
        for (int m = 0; m < THETA_HELD / 32 / THETA_WARPS; m += THETA_PARTS) {
            const int first_j = 32 * THETA_WARPS * m;
            if (first_j < k)
                turn_piece(held + m, all, log_sum, first_i, first_j, k, memory.piece, log_theta_ji);
        }
        return;
    }
    for (int64 first_j = 0; first_j < k; first_j += THETA_PIECE) {
        real b[THETA_PARTS];
        load_columns(b_j, first_j, length, b);
        turn_piece(b, all, log_sum, first_i, first_j, k, memory.piece, log_theta_ji);
    }
}

// The same where the samples are fewer than the classes, for the labels that they have. A row of B
// (my_row) is read once: what is picked of it is still in the cache.
extern "C" __global__ void WIDE log_theta_of_labels(
    const real* channel_logits, const int64* labels, int64 n, int64 k, real* top_i,
    real* log_sum_i, real* log_theta_ji) {
    const int64 i = my_row();
    if (i >= k) return;
    const real* const b_j = channel_logits + i * k;
    const LogSum all = row_log_softmax(b_j, k);
    const real log_sum = log(all.sum);
    if (threadIdx.x == 0) {
        top_i[i] = all.top;
        log_sum_i[i] = log_sum;
    }
    for (int64 first = threadIdx.x; first < n; first += 4 * blockDim.x) {
        int64 z[4];
        real b[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const int64 t = first + m * blockDim.x;
            z[m] = t < n ? labels[t] : -1;
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) b[m] = is_class(z[m], k) ? b_j[z[m]] : real(0);
#pragma unroll
        for (int m = 0; m < 4; ++m)  // samples of one label write the same
            if (is_class(z[m], k)) log_theta_ji[z[m] * k + i] = (b[m] - all.top) - log_sum;
    }
}

// Rows too long for registers. Eqs. 3 and 11 for a row per sample: log m_t, then c_ti, d_logits or both.
//
// The noise layer comes as log theta_i,z_t: row z_t of log_theta_ji where by_label, else row t; in
// the second case c_ti may be the same array. Pointers to results that are not wanted are null;
// log_q_parts (n, 2) gets the two parts of log q_ti = (a_ti - top_t) - log_sum_t.
extern "C" __global__ void WIDE posterior_rows(
    const real* logits, const real* log_theta, int by_label, const int64* labels, int64 n, int64 k,
    real* log_m_t, real* log_q_parts, real* c_ti, real* d_logits) {
    const int64 t = my_row();
    if (t >= n) return;
    const int64 z = labels[t];
    if (!is_class(z, k)) {
        for (int64 i = threadIdx.x; i < k; i += blockDim.x) {
            if (c_ti) c_ti[t * k + i] = not_a_number();
            if (d_logits) d_logits[t * k + i] = not_a_number();
        }
        if (threadIdx.x == 0) log_m_t[t] = not_a_number();
        return;
    }
    const real* a_i = logits + t * k;
    const real* log_theta_i = log_theta + (by_label ? z : t) * k;

    const LogSum all = row_log_softmax(a_i, k);
    const real log_sum = log(all.sum);
    LogSum joint = nothing_yet();
#pragma unroll 4
    for (int64 i = threadIdx.x; i < k; i += blockDim.x)
        joint.add(((a_i[i] - all.top) - log_sum) + log_theta_i[i]);
    const real log_m = row_log_sum(joint).log_of_all();  // Eq. 11

#pragma unroll 4
    for (int64 i = threadIdx.x; i < k; i += blockDim.x) {
        const real log_q = (a_i[i] - all.top) - log_sum;  // Eq. 7
        // An unreachable label has log m = -inf, and all of its terms are: c is NaN.
        const real c = exp((log_q + log_theta_i[i]) - log_m);  // Eq. 3
        if (c_ti) c_ti[t * k + i] = c;
        if (d_logits) d_logits[t * k + i] = quotient(exp(log_q) - c, real(n));
    }
    if (threadIdx.x != 0) return;
    log_m_t[t] = log_m;
    if (log_q_parts) {
        log_q_parts[2 * t] = all.top;
        log_q_parts[2 * t + 1] = log_sum;
    }
}

// N_ij = sum over the samples of label j of c_ti, written as N_ji over log theta_ji, where a label
// occurs. Block (x: true classes, y: samples) owns label blockIdx.x; each y adds its samples in
// order, in float64, and the y's are added in order: the same bits in every run. c is computed a
// second time, from the logits, rather than written and read.
extern "C" __global__ void posterior_counts(const real* logits, const real* log_q_parts,
                                            const real* log_m_t, const int64* order,
                                            const int64* ends_jb, int64 n_chunks, int64 k,
                                            real* log_theta_ji) {
    __shared__ double counts[256];
    const int64 j = blockIdx.x;
    const int64 i = int64(blockIdx.y) * blockDim.x + threadIdx.x;
    const int64 begin = group_begin(ends_jb, n_chunks, j);
    const int64 end = group_begin(ends_jb, n_chunks, j + 1);
    if (begin == end) return;  // the whole block
    const real log_theta = i < k ? log_theta_ji[j * k + i] : real(0);
    double mine = 0;
    if (i < k) {
#pragma unroll 4
        for (int64 place = begin + threadIdx.y; place < end; place += blockDim.y) {
            const int64 t = order[place];
            const real log_q = (logits[t * k + i] - log_q_parts[2 * t]) - log_q_parts[2 * t + 1];
            mine += double(exp((log_q + log_theta) - log_m_t[t]));
        }
    }
    counts[threadIdx.y * blockDim.x + threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y != 0 || i >= k) return;
    for (unsigned y = 1; y < blockDim.y; ++y) mine += counts[y * blockDim.x + threadIdx.x];
    log_theta_ji[j * k + i] = real(mine);
}

// The rows of the table that hold the counts of a label: first, then next and so on, size in all.
struct alignas(16) Rows {
    int first, next, step, size;

    __device__ int row(int r) const { return r == 0 ? first : next + (r - 1) * step; }
};

// per_unit is 0 where row j alone holds all counts of label j.
__device__ inline Rows rows_of_label(const int64* ends_jb, int64 n_chunks, int64 per_unit,
                                     int64 by_place, int64 j) {
    const int64 begin = group_begin(ends_jb, n_chunks, j);
    const int64 end = group_begin(ends_jb, n_chunks, j + 1);
    Rows rows = {int(j), 0, 0, begin < end};
    if (begin == end || per_unit == 0) return rows;
    const int64 unit = divided(begin, per_unit);
    rows.first = int(counts_row(unit, j, begin, by_place));
    rows.next = int(counts_row(unit + 1, j, (unit + 1) * per_unit, by_place));
    rows.step = by_place ? int(per_unit) : 1;
    rows.size = int(divided(end - 1, per_unit) - unit + 1);
    return rows;
}

// A block of channel_gradient has a strip of the table of counts: the 32 bytes that memory is read
// by, of each of its rows. Neighbours have the packs of a row.
const int STRIP = 32 / sizeof(real);
const int STRIP_PACKS = STRIP / PACK;
const int STRIP_LABELS = 1024 / STRIP_PACKS;  // of a block, at a time
const int HELD_LABELS = 2;                    // of a thread, at a time
const int FEW_ROWS = 4;  // of a label: its threads load them together; more are for a warp

// A label of many rows: which they are, then the sums over them.
union alignas(16) ManyRows {
    Rows rows;
    real sum_i[STRIP];
};

// A pack of a row of the table, of which so many numbers are there; the others are zero.
__device__ inline Pack counts_pack(const real* row, int64 n_there, bool in_packs) {
    Pack pack;
#pragma unroll
    for (int m = 0; m < PACK; ++m) pack.of[m] = 0;
    if (in_packs) {
        if (n_there > 0) pack = *reinterpret_cast<const Pack*>(row);
    } else {
#pragma unroll
        for (int m = 0; m < PACK; ++m)
            if (m < n_there) pack.of[m] = row[m];
    }
    return pack;
}

// Sums over the lanes of a warp that have the same pack. Lane l gets that of its number
// l / (32 / PACK); with each exchange, a lane keeps half of what it has.
__device__ inline double strip_sum(double (&mine)[PACK]) {
    int step = 16;
#pragma unroll
    for (int size = PACK / 2; size > 0; size /= 2, step /= 2) {
        const bool is_upper = threadIdx.x & step;
#pragma unroll
        for (int m = 0; m < size; ++m) {
            const double kept = is_upper ? mine[m + size] : mine[m];
            const double given = is_upper ? mine[m] : mine[m + size];
            mine[m] = kept + __shfl_xor_sync(ALL_LANES, given, step);
        }
    }
#pragma unroll
    for (; step >= STRIP_PACKS; step /= 2) mine[0] += __shfl_xor_sync(ALL_LANES, mine[0], step);
    return mine[0];
}

// Where the lane's sum belongs: one of STRIP places, or -1 if another lane has the same.
__device__ inline int strip_place() {
    const int lane = threadIdx.x % 32, same = 32 / PACK;
    return lane % same < STRIP_PACKS ? lane % STRIP_PACKS * PACK + lane / same : -1;
}

// The sums over a label's many rows, by a warp: 32 / STRIP_PACKS rows at a time.
__device__ inline void add_many_rows(ManyRows& label, const real* counts, int64 first_i, int64 k) {
    const Rows rows = label.rows;
    const int lane = threadIdx.x % 32;
    const int64 i = first_i + lane % STRIP_PACKS * PACK;
    double sum[PACK];
#pragma unroll
    for (int m = 0; m < PACK; ++m) sum[m] = 0;
#pragma unroll 4
    for (int r = lane / STRIP_PACKS; r < rows.size; r += 32 / STRIP_PACKS) {
        const Pack pack = counts_pack(counts + rows.row(r) * k + i, k - i, k % PACK == 0);
#pragma unroll
        for (int m = 0; m < PACK; ++m) sum[m] += double(pack.of[m]);
    }
    const double total = strip_sum(sum);
    __syncwarp();  // all have read which rows
    if (strip_place() >= 0) label.sum_i[strip_place()] = real(total);
}

// d_channel_logits = (n_i theta_ij - N_ij) / n, a strip of classes i for each block of 1024 threads.
// One block more adds up the loss, unless that is null. All sums are in a fixed order.
extern "C" __global__ void WIDE channel_gradient(
    const real* channel_logits, const real* top_i, const real* log_sum_i, const real* counts,
    const int64* ends_jb, int64 n_chunks, int64 per_unit, int64 by_place, int64 n, int64 k,
    const double* log_m_u, int64 n_units, real* nll, real* d_channel_logits) {
    __shared__ ManyRows many_rows[STRIP_LABELS * HELD_LABELS];
    __shared__ double totals[32][STRIP];
    __shared__ real n_of_i[STRIP];
    __shared__ int with_many[STRIP_LABELS * HELD_LABELS], n_many;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int64 first_i = int64(blockIdx.x) * STRIP;
    if (first_i >= k) {
        double log_m = 0;
#pragma unroll 4
        for (int64 u = thread; u < n_units; u += 1024) log_m += log_m_u[u];
        log_m = row_sum(log_m);
        if (thread == 0 && nll) *nll = real(-log_m / double(n));
        return;
    }
    if (first_i + thread % STRIP < k)  // what the last lines need
        prefetch_row(channel_logits + (first_i + thread % STRIP) * k, int(k), thread / STRIP,
                     1024 / STRIP);
    // The thread's pack of the strip, of labels `label`, label + STRIP_LABELS and so on.
    const int label = thread / STRIP_PACKS, pack = thread % STRIP_PACKS * PACK;
    const int64 own_i = first_i + pack;
    const real* const own_counts = counts + own_i;
    const int n_there = k - own_i < PACK ? int(k - own_i) : PACK;
    const bool in_packs = k % PACK == 0;
    real n_ij[HELD_LABELS][PACK];  // N_ij
    // By all threads, for the labels from first_j on.
    const auto add_rows = [&](int64 first_j) {
        bool is_many[HELD_LABELS];
        Pack packs[HELD_LABELS][FEW_ROWS];
        if (thread == 0) n_many = 0;
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HELD_LABELS; ++h) {
            const int slot = label + h * STRIP_LABELS;
            Rows rows = {0, 0, 0, 0};
            if (first_j + slot < k)
                rows = rows_of_label(ends_jb, n_chunks, per_unit, by_place, first_j + slot);
            is_many[h] = rows.size > FEW_ROWS;
            if (is_many[h] && pack == 0) {
                many_rows[slot].rows = rows;
                with_many[atomicAdd(&n_many, 1)] = slot;
            }
#pragma unroll
            for (int r = 0; r < FEW_ROWS; ++r)
                packs[h][r] = counts_pack(own_counts + rows.row(r) * k,
                                          r < rows.size && !is_many[h] ? n_there : 0, in_packs);
        }
#pragma unroll
        for (int h = 0; h < HELD_LABELS; ++h) {
            const Pack* const row = packs[h];
#pragma unroll
            for (int m = 0; m < PACK; ++m)
                n_ij[h][m] = (row[0].of[m] + row[1].of[m]) + (row[2].of[m] + row[3].of[m]);
        }
        __syncthreads();
        for (int turn = warp; turn < n_many; turn += 32)
            add_many_rows(many_rows[with_many[turn]], counts, first_i, k);
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HELD_LABELS; ++h) {
            if (!is_many[h]) continue;
#pragma unroll
            for (int m = 0; m < PACK; ++m)
                n_ij[h][m] = many_rows[label + h * STRIP_LABELS].sum_i[pack + m];
        }
    };
    const int64 step_j = STRIP_LABELS * HELD_LABELS, last_j = (k - 1) / step_j * step_j;
    double total = 0;
    for (int64 first_j = 0; first_j <= last_j; first_j += step_j) {
        add_rows(first_j);
        double mine[PACK];
#pragma unroll
        for (int m = 0; m < PACK; ++m) {
            mine[m] = 0;
#pragma unroll
            for (int h = 0; h < HELD_LABELS; ++h) mine[m] += double(n_ij[h][m]);
        }
        total += strip_sum(mine);
    }
    if (strip_place() >= 0) totals[warp][strip_place()] = total;
    __syncthreads();
    if (warp < STRIP) {
        total = warp_sum(totals[lane][warp]);
        if (lane == 0) n_of_i[warp] = real(total);
    }
    __syncthreads();
    // Backwards: what is there is of the last labels.
    const real per_n = 1 / real(n);
    for (int64 first_j = last_j; first_j >= 0; first_j -= step_j) {
        if (first_j != last_j) add_rows(first_j);
#pragma unroll
        for (int h = 0; h < HELD_LABELS; ++h) {
            const int64 j = first_j + label + h * STRIP_LABELS;
#pragma unroll
            for (int m = 0; m < PACK; ++m) {
                const int64 i = own_i + m;
                if (m >= n_there || j >= k) continue;
                const real theta = exp((channel_logits[i * k + j] - top_i[i]) - log_sum_i[i]);
                d_channel_logits[i * k + j] =
                    product(fma(n_of_i[pack + m], theta, -n_ij[h][m]), per_n);
            }
        }
    }
}

// Few classes: everything in one launch of one block, or in two. The noise matrix, a tile of samples
// and the counts are in shared memory; a thread has a sample, then cells (j, i) of the counts.
const int FEW = 32;
const int FEW_THREADS = 256;
const int FEW_CELLS = FEW * FEW / FEW_THREADS;  // of one thread
const int FEW_TILE = 128 * (FEW + 1);
#define TILED __launch_bounds__(FEW_THREADS, 1)

// A warp for each row of theta (Eq. 10).
__device__ inline void few_log_theta(const real* channel_logits, int k,
                                     real (&log_theta_ij)[FEW][FEW + 1]) {
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < k; i += FEW_THREADS / 32) {
        const real b = lane < k ? channel_logits[i * k + lane] : minus_infinity();
        LogSum all = nothing_yet();
        all.add(b);
        all = warp_log_sum(all);
        if (lane < k) log_theta_ij[i][lane] = (b - all.top) - log(all.sum);
    }
}

// A thread's cells of the counts become its cells of d_channel_logits = (n_i theta_ij - N_ij) / n.
__device__ inline void few_gradient(const double (&count)[FEW_CELLS], double* counts_ji,
                                    const real (&log_theta_ij)[FEW][FEW + 1], int64 n, int k,
                                    real* d_channel_logits) {
    __syncthreads();  // counts_ji may be memory that somebody still reads
#pragma unroll
    for (int m = 0; m < FEW_CELLS; ++m)
        if (int(threadIdx.x) + m * FEW_THREADS < k * k)
            counts_ji[threadIdx.x + m * FEW_THREADS] = count[m];
    __syncthreads();
#pragma unroll
    for (int m = 0; m < FEW_CELLS; ++m) {
        const int cell = threadIdx.x + m * FEW_THREADS, j = cell / k, i = cell % k;
        if (cell >= k * k) break;
        double n_i = 0;
        for (int other = 0; other < k; ++other) n_i += counts_ji[other * k + i];
        const double expected = n_i * double(exp(log_theta_ij[i][j]));
        d_channel_logits[i * k + j] = real((expected - count[m]) / double(n));
    }
}

// Eqs. 3, 7, 10 and 11 for per_block samples of each block. Pointers to results that are not wanted
// are null. sums is null if one block has all samples: then it goes on to the loss and the gradient
// of the noise layer. Else sums[block] gets its N_ji and its sum of log m_t, in float64.
extern "C" __global__ void TILED few_classes(
    const real* logits, const real* channel_logits, const int64* labels, int64 n, int64 n_classes,
    int64 per_block, real* log_m_t, real* c_ti, real* d_logits, double* sums, real* nll,
    real* d_channel_logits) {
    __shared__ real log_theta_ij[FEW][FEW + 1];
    __shared__ double memory[FEW_TILE * sizeof(real) / sizeof(double)];
    __shared__ unsigned has_label[FEW][FEW_THREADS / 32];  // a bit for each sample of the tile
    real* const tile = reinterpret_cast<real*>(memory);
    const int k = int(n_classes), pitch = k | 1, s = threadIdx.x;
    const int most = FEW_TILE / pitch / 32 * 32, length = most < FEW_THREADS ? most : FEW_THREADS;
    const int64 begin = int64(blockIdx.x) * per_block;
    const int64 end = begin + per_block < n ? begin + per_block : n;
    const bool counts = sums || d_channel_logits;
    const real per_n = 1 / real(n);
    double count[FEW_CELLS] = {0, 0, 0, 0}, log_m_sum = 0;

    few_log_theta(channel_logits, k, log_theta_ij);
    for (int64 first = begin; first < end; first += length) {
        const int n_here = end - first < length ? int(end - first) : length;
        const int64 z = s < n_here ? labels[first + s] : -1;
        __syncthreads();
        for (int cell = s; cell < n_here * k; cell += FEW_THREADS)
            tile[cell / k * pitch + cell % k] = logits[first * k + cell];
        __syncthreads();
        if (s < n_here) {
            real* const a_i = tile + s * pitch;
            const bool known = is_class(z, k);
            const int column = known ? int(z) : 0;
            real top = minus_infinity(), sum = 0, joint_top = minus_infinity(), joint_sum = 0;
            for (int i = 0; i < k; ++i) top = fmax(top, a_i[i]);
            for (int i = 0; i < k; ++i) {
                const real shifted = a_i[i] - top;
                sum += exp(shifted);
                joint_top = fmax(joint_top, shifted + log_theta_ij[i][column]);
            }
            for (int i = 0; i < k; ++i)
                joint_sum += exp(((a_i[i] - top) + log_theta_ij[i][column]) - joint_top);
            const real per_sum = 1 / sum;
            const real per_joint_sum = known ? 1 / joint_sum : not_a_number();
            for (int i = 0; i < k; ++i) {
                const real shifted = a_i[i] - top, q = exp(shifted) * per_sum;  // Eq. 7
                const real joint = (shifted + log_theta_ij[i][column]) - joint_top;
                const real c = exp(joint) * per_joint_sum;  // Eq. 3; NaN if unreachable
                const int64 at = (first + s) * k + i;
                if (c_ti) c_ti[at] = c;
                if (d_logits) d_logits[at] = product(q - c, per_n);
                a_i[i] = c;
            }
            real log_m = joint_top;  // Eq. 11
            if (!known) log_m = not_a_number();
            else if (joint_top != minus_infinity())
                log_m = (joint_top + log(joint_sum)) - log(sum);
            if (log_m_t) log_m_t[first + s] = log_m;
            log_m_sum += double(log_m);
        }
        if (!counts) continue;
        for (int j = 0; j < k; ++j) {
            const unsigned samples = __ballot_sync(ALL_LANES, z == j);
            if (s % 32 == 0) has_label[j][s / 32] = samples;
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < FEW_CELLS; ++m) {
            const int cell = s + m * FEW_THREADS, j = cell / k, i = cell % k;
            if (cell >= k * k) break;
            for (int word = 0; word < length / 32; ++word) {
                for (unsigned rest = has_label[j][word]; rest; rest &= rest - 1)
                    count[m] += double(tile[(word * 32 + __ffs(rest) - 1) * pitch + i]);
            }
        }
    }
    if (!counts) return;
    log_m_sum = row_sum(log_m_sum);
    if (!sums) {
        if (s == 0) *nll = real(-log_m_sum / double(n));
        few_gradient(count, memory, log_theta_ij, n, k, d_channel_logits);
        return;
    }
    double* const mine = sums + int64(blockIdx.x) * (k * k + 1);
    for (int m = 0; m < FEW_CELLS; ++m)
        if (s + m * FEW_THREADS < k * k) mine[s + m * FEW_THREADS] = count[m];
    if (s == 0) mine[k * k] = log_m_sum;
}

// The blocks' sums added in order, and what follows from them; one block.
extern "C" __global__ void TILED few_classes_end(
    const real* channel_logits, const double* sums, int64 n_blocks, int64 n, int64 n_classes,
    real* nll, real* d_channel_logits) {
    __shared__ real log_theta_ij[FEW][FEW + 1];
    __shared__ double counts_ji[FEW * FEW];
    const int k = int(n_classes), pitch = k * k + 1;
    double count[FEW_CELLS] = {0, 0, 0, 0}, log_m_sum = 0;
    few_log_theta(channel_logits, k, log_theta_ij);
#pragma unroll
    for (int m = 0; m < FEW_CELLS; ++m) {
        const int cell = threadIdx.x + m * FEW_THREADS;
        if (cell >= k * k) break;
#pragma unroll 8
        for (int64 b = 0; b < n_blocks; ++b) count[m] += sums[b * pitch + cell];
    }
    for (int64 b = threadIdx.x; b < n_blocks; b += FEW_THREADS)
        log_m_sum += sums[b * pitch + k * k];
    log_m_sum = row_sum(log_m_sum);
    if (threadIdx.x == 0) *nll = real(-log_m_sum / double(n));
    few_gradient(count, counts_ji, log_theta_ij, n, k, d_channel_logits);
}
