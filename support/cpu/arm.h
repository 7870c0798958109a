// The operations of cpu.h as NEON instructions, which every 64-bit Arm processor has (Apple's, Graviton,
// Raspberry Pi 3 and later).

#pragma once

#include <arm_neon.h>

namespace neon {
#define TARGET
constexpr int LANES = 4, COLUMNS = 4, ENTRIES = 16, TOGETHER = 1, CENTER = 0;
typedef uint8x16x4_t Table;  // four registers
#include "vectors.h"

INLINE Table load_table(const float* source) { return vld1q_u8_x4((const uint8_t*)source); }

// fcvtl: fp16 to float
INLINE Floats load_halves(const uint16_t* source) { return (Floats)vcvt_f32_f16(load<float16x4_t>(source)); }

// tbl: chooses 16 bytes out of 64. Entry e of the table is bytes 4 e .. 4 e + 3; and, multiply-add make these four
// numbers of the lowest 4 bits of each word.
INLINE Floats look_up(Table table, Words word) {
    return (Floats)vqtbl4q_u8(table, (uint8x16_t)((word & 15) * 0x04040404 + 0x03020100));
}

// tbl: chooses among 16 bytes, which are those of 4 rows; so row r adds 4 r to the codes of 2 bits
INLINE Words look_up_bytes(Words levels, Words codes) {
    const Words rows = {0, 0x04040404, 0x08080808, 0x0c0c0c0c};
    return (Words)vqtbl1q_u8((uint8x16_t)levels, (uint8x16_t)(rows | (codes & 0x03030303)));
}

INLINE Ints dot(Ints sum, Words weights, int32_t x4) {
    const int8x16_t w = (int8x16_t)weights, x = (int8x16_t)vdupq_n_s32(x4);
#ifdef __ARM_FEATURE_DOTPROD
    return (Ints)vdotq_s32((int32x4_t)sum, w, x);  // sdot: four products of signed bytes, added to each of 4 sums
#else
    // smull: products of 16 bits, of the lower and the upper half; addp: sums of neighbours, at most 2 * 127 * 127;
    // sadalp: adds neighbours to the sums
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return (Ints)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#endif
}

#include "lookup.h"
#include "dequantize.h"
#include "int8.h"
#undef TARGET
}  // namespace neon
