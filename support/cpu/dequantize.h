// Weights from bits, for many tokens at once: included once for every processor, after vectors.h.
//
// out[j * stride + r] = the weight of row r of tile t in column j: a tile of the transposed weight, in float32.
// The bit of a weight becomes its sign bit: alpha with that sign, added to shift, plane by plane. That is the very sum
// of `BCQLinear.dequantize`, bit for bit. (No include guard: the file is meant to be included several times.)

TARGET static void dequantize_tile(const Job& job, int64_t t, float* out, int64_t stride) {
    const int64_t words_per_group = job.words / job.groups;
    for (int64_t c = 0; c < job.words; c++) {
        const int64_t g = c / words_per_group;
        for (int r = 0; r < TILE; r += LANES) {
            const Floats shift = load_halves(job.shift_of(t, g) + r);

            for (int j = 0; j < TILE; j += 8) {  // 8 columns at a time fit into registers
                Floats weights[8];
                for (int s = 0; s < 8; s++) weights[s] = shift;
                for (int64_t i = 0; i < job.n_bits; i++) {
                    const Words alpha = (Words)load_halves(job.alpha_of(i, t, g) + r);
                    const Words minus = ~load<Words>(job.word(i, t, c) + r) >> j;
#pragma GCC unroll 8
                    for (int s = 0; s < 8; s++) weights[s] += (Floats)(alpha ^ minus >> s << 31);
                }
                for (int s = 0; s < 8; s++)
                    std::memcpy(out + (c * TILE + j + s) * stride + r, &weights[s], sizeof(Floats));
            }
        }
    }
}
