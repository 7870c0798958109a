// The look-up loop, included once for every processor, in a namespace that defines `load_halves`, `load_table` and
// `look_up` (see `emulated` in cpu.h) and these constants:
//     LANES      rows in a vector
//     COLUMNS    columns of x whose signed sums are one table
//     ENTRIES    of a table: 2^COLUMNS
//     TOGETHER   tokens for which the bits are shifted together: as many as there are registers for
//
// For every COLUMNS columns, the sums of +-x_j over all sign patterns make a table that just fits into registers; the
// bits of a plane, LANES rows at a time, are the indices into it. One `look_up` is thus LANES x COLUMNS multiplications
// by +-1. (No include guard: the file is meant to be included several times.)

constexpr int LOOKUPS = (TILE + COLUMNS - 1) / COLUMNS;  // in a word
constexpr int TABLE_SIZE = LOOKUPS * ENTRIES;            // floats for a word of x

// Tile t for TOKENS tokens from b on.
template <int TOKENS>
TARGET INLINE void look_up_tile(const Job& job, int64_t b, int64_t t) {
    constexpr int PARTS = TILE / LANES;
    const int64_t words_per_group = job.words / job.groups;
    Floats alpha[8][PARTS], y[TOKENS][PARTS] = {};

    for (int64_t c = 0; c < job.words; c++) {
        // shift * (sum_j x_j), once in a group
        if (c % words_per_group == 0) {
            const int64_t g = c / words_per_group;
            for (int p = 0; p < PARTS; p++) {
                for (int64_t i = 0; i < job.n_bits; i++) alpha[i][p] = load_halves(job.alpha_of(i, t, g) + p * LANES);
                const Floats shift = load_halves(job.shift_of(t, g) + p * LANES);
                for (int k = 0; k < TOKENS; k++) y[k][p] += shift * job.sums[(b + k) * job.groups + g];
            }
        }

        // alpha_i * (sum_j b_ij x_j)
        for (int64_t i = 0; i < job.n_bits; i++) {
            const int32_t* source = job.word(i, t, c);
            Words word[PARTS];
            Floats sum[TOKENS][PARTS] = {};
            for (int r = 0; r < TILE; r += 16) __builtin_prefetch(source + r + PAGE);
            for (int p = 0; p < PARTS; p++) word[p] = load<Words>(source + p * LANES);
#pragma GCC unroll 11
            for (int l = 0; l < LOOKUPS; l++) {
#pragma GCC unroll 4
                for (int k = 0; k < TOKENS; k++) {
                    const Table table = load_table(job.tables + (((b + k) * job.words + c) * LOOKUPS + l) * ENTRIES);
                    for (int p = 0; p < PARTS; p++) sum[k][p] += look_up(table, word[p]);
                }
                for (int p = 0; p < PARTS; p++) word[p] >>= COLUMNS;
            }
            for (int k = 0; k < TOKENS; k++)
                for (int p = 0; p < PARTS; p++) y[k][p] += alpha[i][p] * sum[k][p];
        }
    }
    for (int k = 0; k < TOKENS; k++) store_tile(job, b + k, t, y[k]);
}

TARGET static void look_up_tiles(const Job& job, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        int64_t b = 0;
        for (; b + TOGETHER <= job.batch; b += TOGETHER) look_up_tile<TOGETHER>(job, b, t);
        for (; b < job.batch; b++) look_up_tile<1>(job, b, t);
    }
}

// tables[c][l][e] = the sum of +-x_j over the columns of look-up l in word c, + where bit j of e is set (columns beyond
// the word count 0), for one token.
static void prepare_tables(const float* x, const Job& job, float* tables) {
    float sign[COLUMNS][ENTRIES];
    for (int j = 0; j < COLUMNS; j++)
        for (int e = 0; e < ENTRIES; e++) sign[j][e] = e >> j & 1 ? 1 : -1;

    for (int64_t c = 0; c < job.words; c++)
        for (int first = 0; first < TILE; first += COLUMNS, tables += ENTRIES) {
            float value[COLUMNS];
            for (int j = 0; j < COLUMNS; j++) value[j] = first + j < TILE ? x[c * TILE + first + j] : 0;
            for (int e = 0; e < ENTRIES; e++) {
                tables[e] = 0;
                for (int j = 0; j < COLUMNS; j++) tables[e] += sign[j][e] * value[j];
            }
        }
}
