// The operations of cpu.h as instructions of Intel and AMD processors. A function with a `target` may only run
// where the processor has it (see `cpu_paths`).

#pragma once

#include <immintrin.h>

namespace avx512 {
#define TARGET __attribute__((target("avx512f,fma")))
constexpr int LANES = 16, COLUMNS = 4, ENTRIES = 16, TOGETHER = 4, CENTER = 128;
typedef __m512 Table;
#include "vectors.h"

TARGET INLINE Table load_table(const float* source) { return _mm512_loadu_ps(source); }

// vcvtph2ps: fp16 to float
TARGET INLINE Floats load_halves(const uint16_t* source) { return (Floats)_mm512_cvtph_ps(load<__m256i>(source)); }

// vpermps: 16 entries in one register, chosen by the lowest 4 bits of each of 16 words
TARGET INLINE Floats look_up(Table table, Words word) { return (Floats)_mm512_permutexvar_ps((__m512i)word, table); }

#include "lookup.h"
#include "dequantize.h"
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,fma")))
// vpshufb: chooses among 16 bytes, which are those of 4 rows; so row r adds 4 (r % 4) to the codes of 2 bits
TARGET INLINE Words look_up_bytes(Words levels, Words codes) {
    const Words rows = (Words)_mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return (Words)_mm512_shuffle_epi8((__m512i)levels, (__m512i)(rows | (codes & 0x03030303)));
}

// vpdpbusd: four products of unsigned and signed bytes, added to each of 16 sums
TARGET INLINE Ints dot(Ints sum, Words weights, int32_t x4) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x4));
}

#include "int8.h"
#undef TARGET
}  // namespace avx512

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
constexpr int LANES = 8, COLUMNS = 3, ENTRIES = 8, TOGETHER = 1, CENTER = 0;
typedef __m256 Table;
#include "vectors.h"

TARGET INLINE Table load_table(const float* source) { return _mm256_loadu_ps(source); }
TARGET INLINE Floats load_halves(const uint16_t* source) { return (Floats)_mm256_cvtph_ps(load<__m128i>(source)); }

// vpermps: 8 entries in one register, chosen by the lowest 3 bits of each of 8 words
TARGET INLINE Floats look_up(Table table, Words word) { return (Floats)_mm256_permutevar8x32_ps(table, (__m256i)word); }

// vpshufb, as above
TARGET INLINE Words look_up_bytes(Words levels, Words codes) {
    const Words rows = {0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c};
    return (Words)_mm256_shuffle_epi8((__m256i)levels, (__m256i)(rows | (codes & 0x03030303)));
}

// vpmaddubsw wants unsigned and signed bytes: |w|, and x with the sign of w. It adds pairs of products, at most
// 2 * 127 * 127, which just fits into 16 bits; vpmaddwd with ones adds pairs of these.
TARGET INLINE Ints dot(Ints sum, Words weights, int32_t x4) {
    const __m256i size = _mm256_abs_epi8((__m256i)weights);
    const __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(x4), (__m256i)weights);
    return sum + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(size, x), _mm256_set1_epi16(1));
}

#include "lookup.h"
#include "dequantize.h"
#include "int8.h"
#undef TARGET
}  // namespace avx2
