// N_ij of Eq. 4: how much of a weight each true class has among the samples of each label.

// counts_e = sum of w_ti over the samples of label j, for link e = i * n_kept + s from true class i
// to label j = support[e]; a dense model, whose support is null, has all k links in order. A row of
// threads owns a link and adds in a fixed order, in float64.
extern "C" __global__ void WIDE counts_of_links(const real* weights_ti, const int64* support,
                                                const int64* order, const int64* ends_jb,
                                                int64 n_chunks, int64 k, int64 n_kept,
                                                double* counts_e) {
    const int64 e = my_row();
    if (e >= k * n_kept) return;
    const int64 i = e / n_kept, j = support ? support[e] : e % n_kept;
    const int64 begin = group_begin(ends_jb, n_chunks, j);
    const int64 end = group_begin(ends_jb, n_chunks, j + 1);
    double mine = 0;
#pragma unroll 4
    for (int64 place = begin + threadIdx.x; place < end; place += blockDim.x)
        mine += double(weights_ti[order[place] * k + i]);
    const double sum = row_sum(mine);
    if (threadIdx.x == 0) counts_e[e] = sum;
}
