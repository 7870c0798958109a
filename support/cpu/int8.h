// The loop of bytes, included once for every processor, in a namespace that defines `load_halves`, `look_up_bytes`
// and `dot` (see `emulated` in cpu.h) and these constants:
//     LANES      rows in a vector of 32-bit words
//     CENTER     what a byte must hold to stand for 0: 0 if the processor multiplies signed bytes, 128 if unsigned ones
//
// x is rounded to integers of -127 .. 127, with a scale of its own for every token and every 32 columns. So are the
// alphas of a row in a group: w - shift = unit * (a sum of +-integers), at most 127 in size, one byte a weight. To make
// these bytes, two planes at a time become codes of 2 bits, and a shuffle of bytes looks the codes up: about 3
// instructions for LANES x 4 weights. Then, for each token, one `dot` multiplies them by 4 columns of x and adds up,
// exactly. The bytes serve all tokens of a call: hence the speed with several.
//
// The price. Rounding puts an x off by at most 1/254 of the largest |x| in its word, and an alpha_i by at most 1/480 of
// the group's sum of |alpha_i| (by nothing where up to 5 of them halve from plane to plane). For a token, the norm of
// the errors is about 0.4 % (with 2 to 4 planes at most 1 %) of the norm of the products, sqrt(sum (w x)^2) over rows
// and columns. An outlier in x takes the precision of the other 31 columns of its word only. (No include guard: the
// file is meant to be included several times.)

// A word of x for one token. Byte q of x4[s] is column s + 8 q. The planes have the same order: after a word is shifted
// right by s, the lowest bits of its four bytes are those of columns s, s + 8, s + 16, s + 24.
struct Word8 {
    int32_t x4[8];
    float scale;     // x = scale * byte
    int32_t center;  // -CENTER * (the sum of the bytes)
};
constexpr int TABLE_SIZE8 = sizeof(Word8) / sizeof(float);

static void prepare_bytes(const float* x, const Job& job, float* tables) {
    for (int64_t c = 0; c < job.words; c++, x += TILE) {
        float largest = 0;
        for (int j = 0; j < TILE; j++) largest = std::max(largest, std::abs(x[j]));
        const float inverse = largest > 0 ? 127 / largest : 0;

        int32_t byte[TILE], sum = 0;
        for (int j = 0; j < TILE; j++) {
            byte[j] = (int32_t)(x[j] * inverse + (x[j] < 0 ? -0.5f : 0.5f));
            sum += byte[j];
        }
        Word8 word;
        for (int s = 0; s < 8; s++)
            word.x4[s] = (byte[s] & 255) | (byte[s + 8] & 255) << 8 | (byte[s + 16] & 255) << 16 |
                         (uint32_t)byte[s + 24] << 24;
        word.scale = largest / 127;
        word.center = -CENTER * sum;
        std::memcpy(tables + c * TABLE_SIZE8, &word, sizeof word);
    }
}

// What the bytes of LANES rows of a group mean: a weight is unit * (byte - CENTER) + offset. Its byte is the sum,
// modulo 256, of one byte of levels[pair] for every pair of planes: which of its bytes 0 .. 3 is said by
// a code of 2 bits, whose lower bit is that of the first plane.
struct Levels {
    Words levels[4];
    Floats unit, offset;
};

TARGET INLINE Octets in_every_byte(Ints lowest) { return (Octets)look_up_bytes((Words)lowest, Words{}); }

TARGET INLINE Levels load_levels(const Job& job, int64_t t, int64_t g, int first_row) {
    Floats alpha[8], total = {};
    for (int64_t i = 0; i < job.n_bits; i++) {
        alpha[i] = load_halves(job.alpha_of(i, t, g) + first_row);
        total += (Floats)((Ints)alpha[i] & 0x7fffffff);  // its absolute value
    }

    // A step from -alpha to +alpha is 2 alpha. All of them together fill most of the 256 values, and leave room for
    // rounding: at most 254. A multiple of 2^n_bits - 1 keeps a uniform quantizer exact, whose alphas halve from plane
    // to plane; else all its groups would have the same error, and the perplexity of a model would rise.
    const int codes = (1 << job.n_bits) - 1;
    const float filled = job.n_bits <= 5 ? 252 / codes * codes : 250;

    Levels out;
    Ints step[9] = {}, sum = {};
    const Floats inverse = filled / (total + 0x1p-40f);  // alpha may be all 0; the smallest that is not is 2^-24
    for (int64_t i = 0; i < job.n_bits; i++) {
        step[i] = (Ints)(alpha[i] * inverse + 0x1.8p23f) - 0x4b400000;  // rounds: no room for fractions
        sum += step[i];
    }

    // half of the steps up and half down lead to shift; where their sum is odd, half a unit is missing
    out.unit = total * (2 / filled);
    const Floats odd = __builtin_convertvector(sum & 1, Floats);
    out.offset = load_halves(job.shift_of(t, g) + first_row) - out.unit * 0.5f * odd;
    Octets zero = in_every_byte(CENTER - (sum >> 1));
    for (int64_t i = 0; i < job.n_bits; i += 2) {
        // the first of two planes is set in codes 1 and 3, the second in 2 and 3
        const Octets low = in_every_byte(step[i]), high = in_every_byte(step[i + 1]);
        out.levels[i / 2] = (Words)(zero + (Octets)((Words)low & 0xff00ff00) + (Octets)((Words)high & 0xffff0000));
        zero = Octets{};
    }
    return out;
}

// The levels of two planes, in `weights[s]` those of columns s, s + 8, s + 16, s + 24: set by the first pair of planes,
// added by the others.
template <bool FIRST>
TARGET INLINE void look_up_pair(Words* weights, const int32_t* plane, const int32_t* next_plane, Words levels) {
    __builtin_prefetch(plane + PAGE);
    __builtin_prefetch(next_plane + PAGE);
    const Words low = load<Words>(plane), high = load<Words>(next_plane);

    // codes of 2 bits: of the even columns and of the odd ones, 16 in a word
    Words even = (low & 0x55555555) | (high << 1 & 0xaaaaaaaa);
    Words odd = (low >> 1 & 0x55555555) | (high & 0xaaaaaaaa);
#pragma GCC unroll 4
    for (int s = 0; s < 8; s += 2, even >>= 2, odd >>= 2) {
        const Octets one = (Octets)look_up_bytes(levels, even), other = (Octets)look_up_bytes(levels, odd);
        weights[s] = (Words)(FIRST ? one : (Octets)weights[s] + one);
        weights[s + 1] = (Words)(FIRST ? other : (Octets)weights[s + 1] + other);
    }
}

// Tile t for TOKENS tokens from b on.
template <int TOKENS>
TARGET INLINE void multiply_bytes_tile(const Job& job, int64_t b, int64_t t) {
    constexpr int PARTS = TILE / LANES;
    const int64_t words_per_group = job.words / job.groups, next = job.tiles * job.words * TILE;
    const Word8* x = (const Word8*)job.tables + b * job.words;  // of token k: x[k * job.words + c]
    Floats y[TOKENS][PARTS] = {};

    for (int64_t g = 0; g < job.groups; g++)
        for (int p = 0; p < PARTS; p++) {
            const Levels levels = load_levels(job, t, g, p * LANES);
            Floats sum[TOKENS] = {};

            for (int64_t c = g * words_per_group; c < (g + 1) * words_per_group; c++) {
                Words weights[8];
                const int32_t* plane = job.word(0, t, c) + p * LANES;
                look_up_pair<true>(weights, plane, job.n_bits > 1 ? plane + next : plane, levels.levels[0]);
                for (int64_t i = 2; i < job.n_bits; i += 2) {
                    plane += 2 * next;  // where no second one is left, any will do: its steps are 0
                    const int32_t* second = i + 1 < job.n_bits ? plane + next : plane;
                    look_up_pair<false>(weights, plane, second, levels.levels[i / 2]);
                }

                for (int k = 0; k < TOKENS; k++) {
                    const Word8& x8 = x[k * job.words + c];
                    Ints dots = x8.center - Ints{};
#pragma GCC unroll 8
                    for (int s = 0; s < 8; s++) dots = dot(dots, weights[s], x8.x4[s]);
                    sum[k] += __builtin_convertvector(dots, Floats) * x8.scale;
                }
            }

            // unit * (sum of integers) + offset * (sum of x)
            for (int k = 0; k < TOKENS; k++) {
                y[k][p] += levels.offset * job.sums[(b + k) * job.groups + g];
                y[k][p] += levels.unit * sum[k];
            }
        }
    for (int k = 0; k < TOKENS; k++) store_tile(job, b + k, t, y[k]);
}

TARGET static void multiply_bytes(const Job& job, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        int64_t b = 0;
        for (; b + 8 <= job.batch; b += 8) multiply_bytes_tile<8>(job, b, t);
        for (; b + 4 <= job.batch; b += 4) multiply_bytes_tile<4>(job, b, t);
        for (; b + 2 <= job.batch; b += 2) multiply_bytes_tile<2>(job, b, t);
        for (; b < job.batch; b++) multiply_bytes_tile<1>(job, b, t);
    }
}
