/* NEON, which every 64-bit ARM has.
 *
 * `vqtbl4q_u8` looks bytes up in a table of 64: the 16 floats of the scaled code table. The index of a float's four bytes
 * is 4 * code + {0, 1, 2, 3}, so one lookup decodes four codes. For 16-bit results the table is 32 bytes and a lookup
 * decodes eight.
 */
#include "kernels.h"

#if defined(__aarch64__) && !defined(__AARCH64EB__)

#include <arm_neon.h>

/* Sixteen codes, one a byte, of 32 values in order: bytes 16 * part .. of high and low halves laid side by side. */
static inline void codes_of(const uint8_t *packed, uint8x16_t codes[2]) {
    uint8x16_t bytes = vld1q_u8(packed);
    uint8x16_t high = vshrq_n_u8(bytes, 4), low = vandq_u8(bytes, vdupq_n_u8(15));
    codes[0] = vzip1q_u8(high, low);
    codes[1] = vzip2q_u8(high, low);
}

static inline uint8x16x4_t scaled_table(float scale) {
    uint8x16x4_t table;
    for (int i = 0; i < 4; i++) table.val[i] = vreinterpretq_u8_f32(vmulq_n_f32(vld1q_f32(tables.nf4 + 4 * i), scale));
    return table;
}

/* Values 4 * part .. 4 * part + 4 of sixteen codes. */
static inline float32x4_t lookup(uint8x16x4_t table, uint8x16_t codes, int part) {
    static const uint8_t repeat[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    static const uint8_t offset[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    uint8x16_t four = vqtbl1q_u8(codes, vaddq_u8(vld1q_u8(repeat), vdupq_n_u8((uint8_t)(4 * part))));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vaddq_u8(vshlq_n_u8(four, 2), vld1q_u8(offset))));
}

static void neon_dequantize(const uint8_t *packed, const float *scales, int64_t blocks, void *out, int type,
                            int stream) {
    (void)stream;
    static const uint8_t repeat[16] = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
    static const uint8_t offset[16] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
    for (int64_t b = 0; b < blocks; b++) {
        uint8x16x4_t wide = scaled_table(scales[b]);
        uint8x16x2_t narrow;
        if (type != FLOAT32) {
            float values[16];
            uint16_t half[16];
            for (int i = 0; i < 4; i++) vst1q_f32(values + 4 * i, vreinterpretq_f32_u8(wide.val[i]));
            for (int i = 0; i < 16; i++) half[i] = type == BFLOAT16 ? to_bfloat16(values[i]) : to_float16(values[i]);
            narrow.val[0] = vreinterpretq_u8_u16(vld1q_u16(half));
            narrow.val[1] = vreinterpretq_u8_u16(vld1q_u16(half + 8));
        }
        for (int part = 0; part < 4; part++) { /* 16 values */
            uint8x16_t codes[2];
            codes_of(packed + b * BLOCK_BYTES + 16 * (part / 2), codes);
            int64_t to = b * BLOCK + 16 * part;
            if (type == FLOAT32) {
                for (int i = 0; i < 4; i++) vst1q_f32((float *)out + to + 4 * i, lookup(wide, codes[part % 2], i));
            } else {
                for (int i = 0; i < 2; i++) {
                    uint8x16_t which = vaddq_u8(vld1q_u8(repeat), vdupq_n_u8((uint8_t)(8 * i)));
                    uint8x16_t eight = vqtbl1q_u8(codes[part % 2], which);
                    uint8x16_t bytes = vqtbl2q_u8(narrow, vaddq_u8(vshlq_n_u8(eight, 1), vld1q_u8(offset)));
                    vst1q_u8((uint8_t *)out + 2 * (to + 8 * i), bytes);
                }
            }
        }
    }
}

static inline float32x4_t neon_load(const void *in, int type, int64_t i) {
    if (type == FLOAT32) return vld1q_f32((const float *)in + i);
    uint16x4_t half = vld1_u16((const uint16_t *)in + i);
    if (type == FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

static void neon_quantize(const void *in, int type, int64_t blocks, uint8_t *packed, float *absmax) {
    for (int64_t b = 0; b < blocks; b++) {
        float32x4_t value[16];
        uint32x4_t largest = vdupq_n_u32(0);
        for (int i = 0; i < 16; i++) {
            value[i] = neon_load(in, type, b * BLOCK + 4 * i);
            largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(value[i]), vdupq_n_u32(0x7fffffff)));
        }
        float scale = float_of(vmaxvq_u32(largest));
        absmax[b] = scale;
        float inverse = 1.0f / (scale < 1e-38f ? 1e-38f : scale);
        for (int i = 0; i < 16; i++) {
            float32x4_t scaled = vmulq_n_f32(value[i], inverse);
            uint32x4_t not_above = vdupq_n_u32(0); /* minus the midpoints that are not below */
            for (int m = 0; m < 15; m++)
                not_above = vaddq_u32(not_above, vcleq_f32(scaled, vdupq_n_f32(tables.midpoints[m])));
            uint32x4_t code = vaddq_u32(not_above, vdupq_n_u32(15));
            packed[b * BLOCK_BYTES + 2 * i] = (uint8_t)(vgetq_lane_u32(code, 0) << 4 | vgetq_lane_u32(code, 1));
            packed[b * BLOCK_BYTES + 2 * i + 1] = (uint8_t)(vgetq_lane_u32(code, 2) << 4 | vgetq_lane_u32(code, 3));
        }
    }
}

static void neon_dot(const uint8_t *packed, const float *scales, int64_t blocks, const float *high, const float *low,
                     int64_t stride, int rows, float *sums) {
    float32x4_t even[MAX_ROWS], odd[MAX_ROWS];
    for (int k = 0; k < MAX_ROWS; k++) even[k] = odd[k] = vdupq_n_f32(0);
    for (int64_t b = 0; b < blocks; b++) {
        uint8x16x4_t table = scaled_table(scales[b]);
        for (int i = 0; i < 2; i++) { /* 16 bytes, 32 values */
            int64_t j = b * BLOCK_BYTES + 16 * i;
            uint8x16_t bytes = vld1q_u8(packed + j);
            uint8x16_t first = vshrq_n_u8(bytes, 4), second = vandq_u8(bytes, vdupq_n_u8(15));
            for (int part = 0; part < 4; part++) {
                float32x4_t w0 = lookup(table, first, part), w1 = lookup(table, second, part);
                for (int k = 0; k < rows; k++) {
                    even[k] = vfmaq_f32(even[k], w0, vld1q_f32(high + k * stride + j + 4 * part));
                    odd[k] = vfmaq_f32(odd[k], w1, vld1q_f32(low + k * stride + j + 4 * part));
                }
            }
        }
    }
    for (int k = 0; k < rows; k++) sums[k] += vaddvq_f32(vaddq_f32(even[k], odd[k]));
}

static inline void widen(const int8_t *values, float32x4_t out[2]) {
    int16x8_t wide = vmovl_s8(vld1_s8(values));
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)));
}

static void neon_int8_dequantize(const int8_t *values, float scale, int64_t n, void *out, int type, int stream) {
    (void)stream;
    int64_t i = 0;
    if (type == FLOAT32)
        for (; i + 8 <= n; i += 8) {
            float32x4_t wide[2];
            widen(values + i, wide);
            vst1q_f32((float *)out + i, vmulq_n_f32(wide[0], scale));
            vst1q_f32((float *)out + i + 4, vmulq_n_f32(wide[1], scale));
        }
    for (; i < n; i++) store_float(out, type, i, (float)values[i] * scale);
}

static void neon_int8_dot(const int8_t *values, int64_t n, const float *x, int64_t stride, int rows, float *sums) {
    for (int k = 0; k < rows; k++) {
        float32x4_t a = vdupq_n_f32(0), b = vdupq_n_f32(0), wide[2];
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            widen(values + i, wide);
            a = vfmaq_f32(a, wide[0], vld1q_f32(x + k * stride + i));
            b = vfmaq_f32(b, wide[1], vld1q_f32(x + k * stride + i + 4));
        }
        sums[k] += vaddvq_f32(vaddq_f32(a, b));
        for (; i < n; i++) sums[k] += (float)values[i] * x[k * stride + i];
    }
}

/* One absmax for 64 values: decoding it is not worth a version of its own. */
static const struct primitives neon = {
    "NEON", neon_dequantize, neon_quantize, neon_dot, neon_int8_dequantize, neon_int8_dot, graft_absmax_decode,
};

const struct primitives *graft_neon(void) { return &neon; }

#else

const struct primitives *graft_neon(void) { return NULL; }

#endif
