/* AVX2 and AVX-512.
 *
 * A 4-bit code is an index into 16 floats. Eight of them fit a 256-bit register, and `vpermps` looks up eight lanes in it
 * at once by the low three bits of each lane; so two lookups and a blend by the fourth bit decode eight codes without
 * touching memory. A 512-bit register holds all 16 and needs one lookup. The block's scale is multiplied into the table
 * (16 products) and not into the values (64): the same products, so the same bits.
 *
 * 16-bit results take another way: the scaled table is rounded to 16 bits, split into a table of low and one of high
 * bytes, and `vpshufb` looks up 32 codes in each.
 *
 * Functions carry their instruction set as an attribute, so this file needs no compiler flags and is safe to load anywhere.
 */
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
/* Calls `function` with the number of rows as a constant, so that its accumulators live in registers. */
#define EACH_ROW_COUNT(function, ...)                  \
    switch (rows) {                                    \
        case 1: function(__VA_ARGS__, 1, sums); break; \
        case 2: function(__VA_ARGS__, 2, sums); break; \
        case 3: function(__VA_ARGS__, 3, sums); break; \
        case 4: function(__VA_ARGS__, 4, sums); break; \
        case 5: function(__VA_ARGS__, 5, sums); break; \
        case 6: function(__VA_ARGS__, 6, sums); break; \
        case 7: function(__VA_ARGS__, 7, sums); break; \
        default: function(__VA_ARGS__, 8, sums);       \
    }

/* Stores of a large result go past the caches: a normal store first reads the line it is about to overwrite, and what
 * was written is gone from the caches before anybody wants it. They need an aligned address. */
INLINE int aligned(const void *address, int64_t bytes) { return (uintptr_t)address % (uintptr_t)bytes == 0; }

/* ---- AVX2 ---- */

INLINE AVX2 void store_floats(float *out, __m256 values, int stream) {
    if (stream)
        _mm256_stream_ps(out, values);
    else
        _mm256_storeu_ps(out, values);
}

INLINE AVX2 void store_bytes(void *out, __m256i bytes, int stream) {
    if (stream)
        _mm256_stream_si256((__m256i *)out, bytes);
    else
        _mm256_storeu_si256((__m256i *)out, bytes);
}

INLINE AVX2 __m256 lookup(__m256 low_half, __m256 high_half, __m256i index, __m256i fourth_bit_on_top) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_half, index), _mm256_permutevar8x32_ps(high_half, index),
                            _mm256_castsi256_ps(fourth_bit_on_top));
}

INLINE AVX2 void avx2_block_float32(const uint8_t *packed, __m256 low_half, __m256 high_half, float *out,
                                     int stream) {
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int i = 0; i < 8; i++) { /* 4 bytes, 8 values */
        int32_t word;
        memcpy(&word, packed + 4 * i, 4);
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
        store_floats(out + 8 * i, lookup(low_half, high_half, index, _mm256_slli_epi32(index, 28)), stream);
    }
}

/* Eight floats as 16-bit numbers of `type` in the low halves of eight 32-bit lanes. */
INLINE AVX2 __m256i avx2_narrow(__m256 values, int type) {
    if (type == FLOAT16) return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

INLINE AVX2 void avx2_block_16bit(const uint8_t *packed, __m256 low_half, __m256 high_half, uint16_t *out, int type,
                                   int stream) {
    const __m256i low_byte = _mm256_set1_epi32(0xff), low_nibble = _mm256_set1_epi8(15);
    __m256i first = avx2_narrow(low_half, type), second = avx2_narrow(high_half, type);
    /* 32-bit lanes -> 16 bytes in order, the same in both 128-bit halves */
    __m256i low = _mm256_packus_epi32(_mm256_and_si256(first, low_byte), _mm256_and_si256(second, low_byte));
    __m256i high = _mm256_packus_epi32(_mm256_srli_epi32(first, 8), _mm256_srli_epi32(second, 8));
    low = _mm256_permute4x64_epi64(low, 0xd8), high = _mm256_permute4x64_epi64(high, 0xd8);
    __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8); /* 16 low bytes, 16 high bytes */
    __m256i low_table = _mm256_permute2x128_si256(both, both, 0x00);
    __m256i high_table = _mm256_permute2x128_si256(both, both, 0x11);

    __m256i bytes = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)packed), 0xd8);
    __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_nibble);
    __m256i odd = _mm256_and_si256(bytes, low_nibble);
    for (int half = 0; half < 2; half++) { /* 32 codes, in order */
        __m256i codes = half ? _mm256_unpackhi_epi8(even, odd) : _mm256_unpacklo_epi8(even, odd);
        __m256i l = _mm256_shuffle_epi8(low_table, codes), h = _mm256_shuffle_epi8(high_table, codes);
        __m256i a = _mm256_unpacklo_epi8(l, h), b = _mm256_unpackhi_epi8(l, h);
        store_bytes(out + 32 * half, _mm256_permute2x128_si256(a, b, 0x20), stream);
        store_bytes(out + 32 * half + 16, _mm256_permute2x128_si256(a, b, 0x31), stream);
    }
}

INLINE AVX2 void avx2_dequantize_as(const uint8_t *packed, const float *scales, int64_t blocks, void *out,
                                    const int type, const int stream) {
    const __m256 low_half = _mm256_loadu_ps(tables.nf4), high_half = _mm256_loadu_ps(tables.nf4 + 8);
    for (int64_t b = 0; b < blocks; b++) {
        __m256 scale = _mm256_set1_ps(scales[b]);
        __m256 low = _mm256_mul_ps(low_half, scale), high = _mm256_mul_ps(high_half, scale);
        const uint8_t *from = packed + b * BLOCK_BYTES;
        if (type == FLOAT32)
            avx2_block_float32(from, low, high, (float *)out + b * BLOCK, stream);
        else
            avx2_block_16bit(from, low, high, (uint16_t *)out + b * BLOCK, type, stream);
    }
    if (stream) _mm_sfence();
}

AVX2 static void avx2_dequantize(const uint8_t *packed, const float *scales, int64_t blocks, void *out, int type,
                                 int stream) {
    stream = stream && aligned(out, 32);
    if (type == FLOAT32 && stream)
        avx2_dequantize_as(packed, scales, blocks, out, FLOAT32, 1);
    else if (type == FLOAT32)
        avx2_dequantize_as(packed, scales, blocks, out, FLOAT32, 0);
    else if (type == BFLOAT16)
        avx2_dequantize_as(packed, scales, blocks, out, BFLOAT16, stream);
    else
        avx2_dequantize_as(packed, scales, blocks, out, FLOAT16, stream);
}

INLINE AVX2 __m256 avx2_load(const void *in, int type, int64_t i) {
    if (type == FLOAT32) return _mm256_loadu_ps((const float *)in + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)in + i));
    if (type == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* How many midpoints lie below each lane: a binary search whose last two steps look their midpoint up. */
INLINE AVX2 __m256i avx2_nearest(__m256 value) {
    const float *m = tables.midpoints;
    const __m256 third = _mm256_setr_ps(m[1], m[5], m[9], m[13], 0, 0, 0, 0);
    const __m256 fourth = _mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]);
    __m256 above = _mm256_cmp_ps(value, _mm256_set1_ps(m[7]), _CMP_NLE_UQ); /* all ones is -1 */
    __m256 next = _mm256_blendv_ps(_mm256_set1_ps(m[3]), _mm256_set1_ps(m[11]), above);
    __m256i code = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_castps_si256(above));
    above = _mm256_cmp_ps(value, next, _CMP_NLE_UQ);
    code = _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(above));
    above = _mm256_cmp_ps(value, _mm256_permutevar8x32_ps(third, code), _CMP_NLE_UQ);
    code = _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(above));
    above = _mm256_cmp_ps(value, _mm256_permutevar8x32_ps(fourth, code), _CMP_NLE_UQ);
    return _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(above));
}

INLINE AVX2 void avx2_quantize_as(const void *in, int type, int64_t blocks, uint8_t *packed, float *absmax) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), weights = _mm256_set1_epi16(0x0110); /* 16 and 1 */
    for (int64_t b = 0; b < blocks; b++) {
        __m256 value[8];
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            value[i] = avx2_load(in, type, b * BLOCK + 8 * i);
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(value[i]), magnitude));
        }
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        float scale = float_of((uint32_t)_mm_cvtsi128_si32(four));
        absmax[b] = scale;
        __m256 inverse = _mm256_set1_ps(1.0f / (scale < 1e-38f ? 1e-38f : scale));
        __m256i words[2]; /* 16 bytes' worth of pairs each, the 128-bit halves interleaved by fours */
        for (int half = 0; half < 2; half++) {
            __m256i c[4];
            for (int i = 0; i < 4; i++) c[i] = avx2_nearest(_mm256_mul_ps(value[4 * half + i], inverse));
            __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
            words[half] = _mm256_maddubs_epi16(bytes, weights); /* even code * 16 + odd code */
        }
        __m256i pairs = _mm256_packus_epi16(words[0], words[1]);
        __m128i first = _mm256_castsi256_si128(pairs), second = _mm256_extracti128_si256(pairs, 1);
        _mm_storeu_si128((__m128i *)(packed + b * BLOCK_BYTES), _mm_unpacklo_epi16(first, second));
        _mm_storeu_si128((__m128i *)(packed + b * BLOCK_BYTES + 16), _mm_unpackhi_epi16(first, second));
    }
}

AVX2 static void avx2_quantize(const void *in, int type, int64_t blocks, uint8_t *packed, float *absmax) {
    if (type == FLOAT32)
        avx2_quantize_as(in, FLOAT32, blocks, packed, absmax);
    else if (type == BFLOAT16)
        avx2_quantize_as(in, BFLOAT16, blocks, packed, absmax);
    else
        avx2_quantize_as(in, FLOAT16, blocks, packed, absmax);
}

INLINE AVX2 float avx2_sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* 32 codes, the fours of each half's bytes being codes 0, 8, 16, 24 and 4, 12, 20, 28 on, to 4 x 8 floats in their order. */
INLINE AVX2 void avx2_decode(const __m256i *table, __m256i codes, const int scaled, __m256 scale, __m256 *to) {
    __m256i b0 = _mm256_shuffle_epi8(table[0], codes), b1 = _mm256_shuffle_epi8(table[1], codes);
    __m256i b2 = _mm256_shuffle_epi8(table[2], codes), b3 = _mm256_shuffle_epi8(table[3], codes);
    __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
    __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
    to[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    to[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    to[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    to[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
    if (scaled) UNROLLED for (int i = 0; i < 4; i++) to[i] = _mm256_mul_ps(to[i], scale);
}

/* The sums of eight registers' lanes. */
INLINE AVX2 __m256 avx2_eight_sums(const __m256 *v) {
    __m256 pair[4], four[2];
    UNROLLED for (int i = 0; i < 4; i++)
        pair[i] = _mm256_add_ps(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLLED for (int i = 0; i < 2; i++) {
        __m256d a = _mm256_castps_pd(pair[2 * i]), b = _mm256_castps_pd(pair[2 * i + 1]);
        four[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

/* `vpshufb` looks 32 codes up at once, a byte of their floats at a time; putting the four bytes together costs less than
 * the eight lookups of `vpermps`, which take two steps each on many processors. For one or two rows the scale is multiplied
 * into a block's sums (2 products a row), for more into its values (8 products). */
INLINE AVX2 void avx2_dot_rows(const uint8_t *packed, const float *scales, int64_t blocks, const float *high,
                               const float *low, int64_t stride, const int rows, float *sums) {
    const __m256i nibble = _mm256_set1_epi8(15), order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const int late = rows <= 2, chains = rows <= 4 ? 2 : 1; /* sums of a row that go on side by side: each waits for itself */
    __m256i table[4]; /* of each byte of the 16 values, the same in both halves */
    UNROLLED for (int k = 0; k < 4; k++)
        table[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tables.nf4_bytes[k]));
    __m256 all[MAX_ROWS], sum[MAX_ROWS];
    UNROLLED for (int k = 0; k < rows * chains; k++) all[k] = sum[k] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        const __m256 scale = _mm256_set1_ps(scales[b]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(packed + b * BLOCK_BYTES)), order);
        __m256 w[4];
        if (late) UNROLLED for (int k = 0; k < rows * chains; k++) sum[k] = _mm256_setzero_ps();
        avx2_decode(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), !late, scale, w);
        UNROLLED for (int k = 0; k < rows; k++)
            UNROLLED for (int i = 0; i < 4; i++)
                sum[k * chains + i % chains] = _mm256_fmadd_ps(
                    w[i], _mm256_loadu_ps(high + k * stride + b * BLOCK_BYTES + 8 * i), sum[k * chains + i % chains]);
        avx2_decode(table, _mm256_and_si256(bytes, nibble), !late, scale, w);
        UNROLLED for (int k = 0; k < rows; k++)
            UNROLLED for (int i = 0; i < 4; i++)
                sum[k * chains + i % chains] = _mm256_fmadd_ps(
                    w[i], _mm256_loadu_ps(low + k * stride + b * BLOCK_BYTES + 8 * i), sum[k * chains + i % chains]);
        if (late) UNROLLED for (int k = 0; k < rows * chains; k++) all[k] = _mm256_fmadd_ps(sum[k], scale, all[k]);
    }
    if (late) UNROLLED for (int k = 0; k < rows * chains; k++) sum[k] = all[k];
    if (rows == MAX_ROWS) {
        _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), avx2_eight_sums(sum)));
        return;
    }
    UNROLLED for (int k = 0; k < rows; k++)
        sums[k] += avx2_sum(chains == 2 ? _mm256_add_ps(sum[2 * k], sum[2 * k + 1]) : sum[k]);
}

AVX2 static void avx2_dot(const uint8_t *packed, const float *scales, int64_t blocks, const float *high,
                          const float *low, int64_t stride, int rows, float *sums) {
    EACH_ROW_COUNT(avx2_dot_rows, packed, scales, blocks, high, low, stride)
}

INLINE AVX2 int64_t avx2_int8_dense(const int8_t *values, float scale, int64_t n, void *out, int type, int stream) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(values + i));
        __m256 first = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), factor);
        bytes = _mm_unpackhi_epi64(bytes, bytes);
        __m256 second = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), factor);
        if (type == FLOAT32) {
            store_floats((float *)out + i, first, stream);
            store_floats((float *)out + i + 8, second, stream);
        } else {
            __m256i halves = _mm256_packus_epi32(avx2_narrow(first, type), avx2_narrow(second, type));
            store_bytes((uint16_t *)out + i, _mm256_permute4x64_epi64(halves, 0xd8), stream);
        }
    }
    if (stream) _mm_sfence();
    return i;
}

AVX2 static void avx2_int8_dequantize(const int8_t *values, float scale, int64_t n, void *out, int type, int stream) {
    int64_t i;
    stream = stream && aligned(out, 32);
    if (type == FLOAT32)
        i = avx2_int8_dense(values, scale, n, out, FLOAT32, stream);
    else if (type == BFLOAT16)
        i = avx2_int8_dense(values, scale, n, out, BFLOAT16, stream);
    else
        i = avx2_int8_dense(values, scale, n, out, FLOAT16, stream);
    for (; i < n; i++) store_float(out, type, i, (float)values[i] * scale);
}

INLINE AVX2 void avx2_int8_dot_rows(const int8_t *values, int64_t n, const float *x, int64_t stride, const int rows,
                                    float *sums) {
    __m256 a[MAX_ROWS], b[MAX_ROWS];
    UNROLLED for (int k = 0; k < rows; k++) a[k] = b[k] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(values + i));
        __m256 w0 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        __m256 w1 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
        UNROLLED for (int k = 0; k < rows; k++) {
            a[k] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(x + k * stride + i), a[k]);
            b[k] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(x + k * stride + i + 8), b[k]);
        }
    }
    UNROLLED for (int k = 0; k < rows; k++) {
        sums[k] += avx2_sum(_mm256_add_ps(a[k], b[k]));
        for (int64_t j = i; j < n; j++) sums[k] += (float)values[j] * x[k * stride + j];
    }
}

AVX2 static void avx2_int8_dot(const int8_t *values, int64_t n, const float *x, int64_t stride, int rows, float *sums) {
    EACH_ROW_COUNT(avx2_int8_dot_rows, values, n, x, stride)
}

AVX2 static void avx2_absmax(const uint8_t *codes, float scale, float offset, int64_t n, float *out) {
    const __m256 factor = _mm256_set1_ps(scale), mean = _mm256_set1_ps(offset);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
        __m256 product = _mm256_mul_ps(_mm256_i32gather_ps(tables.dynamic, index, 4), factor);
        _mm256_storeu_ps(out + i, _mm256_add_ps(product, mean));
    }
    for (; i < n; i++) {
        float product = tables.dynamic[codes[i]] * scale;
        out[i] = product + offset;
    }
}

static const struct primitives avx2 = {
    "AVX2", avx2_dequantize, avx2_quantize, avx2_dot, avx2_int8_dequantize, avx2_int8_dot, avx2_absmax,
};

/* ---- AVX-512: what gains by it, the rest as above ---- */

INLINE AVX512 void avx512_dequantize_as(const uint8_t *packed, const float *scales, int64_t blocks, float *out,
                                        const int stream) {
    const __m512 table = _mm512_loadu_ps(tables.nf4);
    const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    for (int64_t b = 0; b < blocks; b++) {
        __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(scales[b]));
        for (int i = 0; i < 4; i++) { /* 8 bytes, 16 values */
            int32_t words[2];
            memcpy(words, packed + b * BLOCK_BYTES + 8 * i, 8);
            __m512i index = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
            index = _mm512_srlv_epi32(index, shifts); /* the lookup reads the low four bits */
            __m512 values = _mm512_permutexvar_ps(index, scaled);
            if (stream)
                _mm512_stream_ps(out + b * BLOCK + 16 * i, values);
            else
                _mm512_storeu_ps(out + b * BLOCK + 16 * i, values);
        }
    }
    if (stream) _mm_sfence();
}

AVX512 static void avx512_dequantize(const uint8_t *packed, const float *scales, int64_t blocks, void *out, int type,
                                     int stream) {
    if (type != FLOAT32)
        avx2_dequantize(packed, scales, blocks, out, type, stream);
    else if (stream && aligned(out, 64))
        avx512_dequantize_as(packed, scales, blocks, out, 1);
    else
        avx512_dequantize_as(packed, scales, blocks, out, 0);
}

INLINE AVX512 void avx512_dot_rows(const uint8_t *packed, const float *scales, int64_t blocks, const float *high,
                                   const float *low, int64_t stride, const int rows, float *sums) {
    const __m512 table = _mm512_loadu_ps(tables.nf4);
    __m512 even[MAX_ROWS], odd[MAX_ROWS]; /* 32 registers: room for two each */
    UNROLLED for (int k = 0; k < rows; k++) even[k] = odd[k] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(scales[b]));
        for (int i = 0; i < 2; i++) { /* 16 bytes, 32 values */
            int64_t j = b * BLOCK_BYTES + 16 * i;
            __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + j)));
            __m512 w0 = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), scaled);
            __m512 w1 = _mm512_permutexvar_ps(pairs, scaled);
            UNROLLED for (int k = 0; k < rows; k++) {
                even[k] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(high + k * stride + j), even[k]);
                odd[k] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(low + k * stride + j), odd[k]);
            }
        }
    }
    UNROLLED for (int k = 0; k < rows; k++) sums[k] += _mm512_reduce_add_ps(_mm512_add_ps(even[k], odd[k]));
}

AVX512 static void avx512_dot(const uint8_t *packed, const float *scales, int64_t blocks, const float *high,
                              const float *low, int64_t stride, int rows, float *sums) {
    EACH_ROW_COUNT(avx512_dot_rows, packed, scales, blocks, high, low, stride)
}

static const struct primitives avx512 = {
    "AVX-512", avx512_dequantize, avx2_quantize, avx512_dot, avx2_int8_dequantize, avx2_int8_dot, avx2_absmax,
};

const struct primitives *graft_x86(int level) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return NULL;
    if (level == 0) return &avx2;
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide ? &avx512 : NULL;
}

#else

const struct primitives *graft_x86(int level) {
    (void)level;
    return NULL;
}

#endif
