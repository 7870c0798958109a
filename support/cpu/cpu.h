// y = x W^T from bit-planes on a CPU, in plain C++ without PyTorch. The layout is in kernel.py.
//
// With w = sum_i alpha_i b_i + shift, a row of a group contributes
//     sum_i alpha_i * (sum_j b_ij x_j)  +  shift * (sum_j x_j)
//
// `scalar` below says this in the obvious way and is the definition. Two faster ways compute the same:
//     lookup.h   looks the inner sums up in tables; as exact as the scalar way
//     int8.h     multiplies bytes; about 0.4 % off, and faster when several tokens share the work
// and for many tokens, dequantize.h makes tiles of weights for an ordinary matrix product. These are written
// once, for vectors of any width (an extension of C++ that GCC and clang share: + - * & >> act on all elements at once)
// and five operations: load_halves, load_table (its type: Table), look_up, look_up_bytes, dot. x86.h and arm.h say
// which instructions of a processor these are, and `emulated` below says what they mean.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own headers, wrongly
#pragma GCC optimize("no-tree-ter")  // else the innermost loop is reordered: every addition waits for the one before
#endif

constexpr int TILE = 32;  // rows side by side, and columns in a word

struct Job {
    const int32_t* planes;  // (n_bits, tiles, words, 32)
    const uint16_t* alpha;  // (n_bits, tiles, groups, 32) fp16
    const uint16_t* shift;  // (tiles, groups, 32) fp16
    const float* x;         // (batch, 32 * words)
    float* y;               // (batch, out_features)
    const float* tables;    // (batch, words, table_size): what the path has made of x beforehand
    const float* sums;      // (batch, groups): the sum of x over each group
    int64_t n_bits, tiles, words, groups, batch, out_features;

    const int32_t* word(int64_t i, int64_t t, int64_t c) const { return planes + ((i * tiles + t) * words + c) * TILE; }
    const uint16_t* alpha_of(int64_t i, int64_t t, int64_t g) const {
        return alpha + ((i * tiles + t) * groups + g) * TILE;
    }
    const uint16_t* shift_of(int64_t t, int64_t g) const { return shift + (t * groups + g) * TILE; }
};

// Functions that are part of a loop below: in it, they are compiled for its processor.
#define INLINE __attribute__((always_inline)) static inline

// The next page of bits is fetched while this one is multiplied: at its end the hardware's own prefetching stops.
constexpr int PAGE = 32 * TILE;

// A finite fp16 number. The smallest have exponent 0 and are whole multiples of 2^-24; none becomes a subnormal float,
// which a CPU may have been told to take for 0.
INLINE float half_to_float(uint16_t half) {
    const uint32_t bits = ((uint32_t)(half & 0x7fff) << 13) + (112 << 23);  // exponent and fraction in place
    float value;
    std::memcpy(&value, &bits, 4);
    if ((half & 0x7c00) == 0) value = (float)(half & 0x3ff) * 0x1p-24f;
    return half & 0x8000 ? -value : value;
}

INLINE void store_tile(const Job& job, int64_t b, int64_t t, const void* y) {
    const int64_t rows = std::min<int64_t>(TILE, job.out_features - t * TILE);  // the last tile may end in padding
    std::memcpy(job.y + b * job.out_features + t * TILE, y, rows * sizeof(float));
}

// sums[g] = the sum of x over group g, for one token; four columns at a time, so that fewer roundings add up
static void prepare_sums(const float* x, const Job& job, float* sums) {
    for (int64_t g = 0; g < job.groups; g++) {
        sums[g] = 0;
        for (int64_t c = 0; c < job.words / job.groups; c++) {
            float sum = 0;
            for (int j = 0; j < TILE; j += 4, x += 4) sum += x[0] + x[1] + x[2] + x[3];
            sums[g] += sum;
        }
    }
}

// ------------------------------------------------------------------------------------------------ the definition

static void scalar(const Job& job, int64_t begin, int64_t end) {
    const int64_t words_per_group = job.words / job.groups;
    float alpha[8][TILE];
    for (int64_t b = 0; b < job.batch; b++)
        for (int64_t t = begin; t < end; t++) {
            float y[TILE] = {};
            for (int64_t c = 0; c < job.words; c++) {
                const int64_t g = c / words_per_group;
                const float* x = job.x + (b * job.words + c) * TILE;

                // shift * (sum_j x_j), once in a group
                if (c % words_per_group == 0) {
                    for (int64_t i = 0; i < job.n_bits; i++)
                        for (int r = 0; r < TILE; r++) alpha[i][r] = half_to_float(job.alpha_of(i, t, g)[r]);
                    for (int r = 0; r < TILE; r++)
                        y[r] += half_to_float(job.shift_of(t, g)[r]) * job.sums[b * job.groups + g];
                }

                // alpha_i * (sum_j b_ij x_j): the rows are the inner loop, which compilers turn into vectors
                for (int64_t i = 0; i < job.n_bits; i++) {
                    const int32_t* word = job.word(i, t, c);
                    float dot[TILE] = {};
                    for (int j = 0; j < TILE; j++)
                        for (int r = 0; r < TILE; r++) dot[r] += word[r] >> j & 1 ? x[j] : -x[j];
                    for (int r = 0; r < TILE; r++) y[r] += alpha[i][r] * dot[r];
                }
            }
            store_tile(job, b, t, y);
        }
}

// ------------------------------------------------------------- what the operations mean, and paths made of them

namespace emulated {
#define TARGET  // whatever the compiler assumes
constexpr int LANES = 4, COLUMNS = 4, ENTRIES = 16, TOGETHER = 2, CENTER = 128;
typedef const float* Table;
#include "vectors.h"

INLINE Table load_table(const float* source) { return source; }

// As many fp16 numbers as a vector has elements.
INLINE Floats load_halves(const uint16_t* source) {
    Floats out;
    for (int r = 0; r < LANES; r++) out[r] = half_to_float(source[r]);
    return out;
}

// Of every word the lowest bits choose an entry.
INLINE Floats look_up(Table table, Words word) {
    Floats out;
    for (int r = 0; r < LANES; r++) out[r] = table[word[r] % ENTRIES];
    return out;
}

// The lowest 2 bits of each byte choose a byte of the same row.
INLINE Words look_up_bytes(Words levels, Words codes) {
    Words out = {};
    for (int r = 0; r < LANES; r++)
        for (int q = 0; q < 32; q += 8) out[r] |= (levels[r] >> 8 * (codes[r] >> q & 3) & 255) << q;
    return out;
}

// Every sum plus four products: of a row's bytes of weights, unsigned here, and the signed bytes of x4.
INLINE Ints dot(Ints sum, Words weights, int32_t x4) {
    for (int r = 0; r < LANES; r++)
        for (int q = 0; q < 32; q += 8) sum[r] += (int32_t)(weights[r] >> q & 255) * (int8_t)(x4 >> q);
    return sum;
}

#include "lookup.h"
#include "int8.h"
#include "dequantize.h"
#undef TARGET
}  // namespace emulated

#ifdef __x86_64__
#include "x86.h"
#elif defined(__aarch64__)
#include "arm.h"
#endif

// ---------------------------------------------------------------------------------------------- which paths there are

struct Path {
    std::string name;
    int64_t table_size;  // floats for a word of x
    void (*prepare)(const float* x, const Job&, float* tables);  // for one token
    void (*run)(const Job&, int64_t begin, int64_t end);         // tiles begin to end - 1
    void (*dequantize_tile)(const Job&, int64_t t, float* out, int64_t stride);
};

// The paths of this CPU, best first, and some more for tests. (Every processor with AVX2 has F16C, too.)
static std::vector<Path> cpu_paths() {
    std::vector<Path> paths;
#define LOOK_UP(name) {#name, name::TABLE_SIZE, name::prepare_tables, name::look_up_tiles, name::dequantize_tile}
#ifdef __x86_64__
    const bool fma = __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f")) paths.push_back(LOOK_UP(avx512));
    if (fma && __builtin_cpu_supports("avx2")) paths.push_back(LOOK_UP(avx2));
#elif defined(__aarch64__)
    paths.push_back(LOOK_UP(neon));
#endif
    paths.push_back({"scalar", 0, [](const float*, const Job&, float*) {}, scalar, emulated::dequantize_tile});
    paths.push_back(LOOK_UP(emulated));

    // less exact ones, for those who ask for them
#define INT8(name) \
    {#name "_int8", name::TABLE_SIZE8, name::prepare_bytes, name::multiply_bytes, name::dequantize_tile}
#ifdef __x86_64__
    if (fma && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        paths.push_back(INT8(avx512));
    if (fma && __builtin_cpu_supports("avx2")) paths.push_back(INT8(avx2));
#elif defined(__aarch64__)
    paths.push_back(INT8(neon));
#endif
    paths.push_back(INT8(emulated));
#undef LOOK_UP
#undef INT8
    return paths;
}
