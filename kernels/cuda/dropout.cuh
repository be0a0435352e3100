// Dropout's choice: a hash of place and seed, to the bit as in the NumPy and Numba twins.

// The bits of x well mixed (Wellons' hash lowbias32, a bijection).
__device__ inline unsigned mixed(unsigned x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// A seed that is given as a number or, where `at` is not null, lies in memory: there it can be
// another one whenever a recorded launch is repeated.
__device__ inline int64 seed_of(int64 number, const int64* at) { return at ? *at : number; }

// Whether dropout keeps the number at a flat index (modulo 2^32). The keys are those of
// dropout_keys in network_api.py, handed over as 64-bit integers; their lower 32 bits count.
__device__ inline bool is_kept(int64 place, int64 key_1, int64 key_2, int64 least) {
    return mixed(mixed(unsigned(place) ^ unsigned(key_1)) ^ unsigned(key_2)) >= unsigned(least);
}
