/* The matmul with AVX-512: tiles of 12 x 32 sums in 24 registers. See `gemm.h` for its parts.
 *
 * A matmul may be `narrow`: both inputs are rounded to bfloat16 as they are packed, two values of k beside each other in a
 * 32-bit word, and AVX-512's bfloat16 instruction multiplies twice as many pairs in the same time, summed in float32.
 */
#include "gemm.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512_BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

enum { MR = 12, NR = 32 };

/* ---- packing ---- */

/* to[k * width + i] = value k of row i for i < rows, k < count, `width` a multiple of 4 with zeros behind `rows`: blocks of
 * 4 x 16 values are turned within registers. Row i begins at from + i * stride; a value is one number there, or a word of two. */
#define TURN(name, set, load, per_value)                                                                               \
set static void name(const float *from, int64_t stride, int rows, int64_t count, float *to, const int width) {        \
    for (int i = 0; i < width; i += 4) {                                                                               \
        const float *p[4];                                                                                             \
        int here = rows - i;                                                                                           \
        for (int j = 0; j < 4; j++) p[j] = from + (i + (j < here ? j : 0)) * stride; /* beyond: any row, not used */    \
        if (here <= 0) {                                                                                               \
            for (int64_t k = 0; k < count; k++) _mm_storeu_ps(to + k * width + i, _mm_setzero_ps());                   \
            continue;                                                                                                  \
        }                                                                                                              \
        int64_t k = 0;                                                                                                 \
        for (; k + 16 <= count; k += 16) {                                                                             \
            __m512 r[4];                                                                                               \
            UNROLLED for (int j = 0; j < 4; j++)                                                                       \
                r[j] = j < here ? load(p[j] + k * per_value) : _mm512_setzero_ps();                                    \
            __m512 t0 = _mm512_unpacklo_ps(r[0], r[1]), t1 = _mm512_unpackhi_ps(r[0], r[1]);                           \
            __m512 t2 = _mm512_unpacklo_ps(r[2], r[3]), t3 = _mm512_unpackhi_ps(r[2], r[3]);                           \
            __m512 c[4]; /* 128-bit lane l of c[j] holds values k + 4 l + j */                                         \
            c[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t0), _mm512_castps_pd(t2)));                   \
            c[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t0), _mm512_castps_pd(t2)));                   \
            c[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t1), _mm512_castps_pd(t3)));                   \
            c[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t1), _mm512_castps_pd(t3)));                   \
            UNROLLED for (int j = 0; j < 4; j++) {                                                                     \
                float *at = to + (k + j) * width + i;                                                                  \
                _mm_storeu_ps(at, _mm512_castps512_ps128(c[j]));                                                       \
                _mm_storeu_ps(at + 4 * width, _mm512_extractf32x4_ps(c[j], 1));                                        \
                _mm_storeu_ps(at + 8 * width, _mm512_extractf32x4_ps(c[j], 2));                                        \
                _mm_storeu_ps(at + 12 * width, _mm512_extractf32x4_ps(c[j], 3));                                       \
            }                                                                                                          \
        }                                                                                                              \
        for (; k < count; k++)                                                                                         \
            for (int j = 0; j < 4; j++) to[k * width + i + j] = j < here ? p[j][k] : 0.0f;                             \
    }                                                                                                                  \
}

TURN(turn, AVX512, _mm512_loadu_ps, 1)

/* 16 x 16 at a time: to[k * NR + i] = from[i * stride + k], for the 32 rows of a full panel of B. */
AVX512 static void turn_16(const float *from, int64_t stride, float *to) {
    __m512 r[16], t[16];
    UNROLLED for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * stride);
    UNROLLED for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        _mm512_storeu_ps(to + i * NR, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_ps(to + (i + 8) * NR, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_ps(to + (i + 4) * NR, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_ps(to + (i + 12) * NR, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

AVX512 static void turn_panel(const float *from, int64_t stride, int rows, int64_t count, float *to) {
    if (rows < NR) {
        turn(from, stride, rows, count, to, NR);
        return;
    }
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) {
        turn_16(from + k, stride, to + k * NR);
        turn_16(from + 16 * stride + k, stride, to + k * NR + 16);
    }
    if (k < count) turn(from + k, stride, rows, count - k, to + k * NR, NR);
}

AVX512 static void cut(const float *row, int64_t columns, int64_t k, int64_t count, float *to) {
    int64_t n = 0;
    for (; n + NR <= columns; n += NR) {
        float *at = to + panel_of(n, NR, count) + k * NR;
        _mm512_storeu_ps(at, _mm512_loadu_ps(row + n));
        _mm512_storeu_ps(at + 16, _mm512_loadu_ps(row + n + 16));
    }
    if (n < columns) {
        float *at = to + panel_of(n, NR, count) + k * NR;
        uint32_t mask = (1u << (columns - n)) - 1;
        _mm512_storeu_ps(at, _mm512_maskz_loadu_ps((__mmask16)mask, row + n));
        _mm512_storeu_ps(at + 16, _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), row + n + 16));
    }
}

AVX512 static void turn_rows(const float *from, int64_t stride, int rows, int64_t count, float *to) {
    turn(from, stride, rows, count, to, MR);
}

AVX512 static void copy_rows(const float *from, int64_t stride, int here, int64_t count, float *to) {
    const __mmask16 mask = (__mmask16)((1u << here) - 1);
    for (int64_t k = 0; k < count; k++)
        _mm512_mask_storeu_ps(to + k * MR, 0x0fff, _mm512_maskz_loadu_ps(mask, from + k * stride));
}

/* ---- packing in bfloat16: panels of words that hold values k and k + 1 ---- */

/* The words of a row of `count` values; an odd end is filled up with a zero. */
AVX512_BF16 static void to_words(const float *from, int64_t count, float *words) {
    uint16_t *to = (uint16_t *)words;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
        memcpy(to + i, &both, 64);
    }
    for (; i < count; i++) to[i] = to_bfloat16(from[i]);
    if (count & 1) to[count] = 0;
}

/* Words of 16 values of row k and the same of row k + 1. */
INLINE AVX512_BF16 __m512 pair(__m512 first, __m512 second) {
    __m256bh low = _mm512_cvtneps_pbh(first), high = _mm512_cvtneps_pbh(second);
    __m256i l, h;
    memcpy(&l, &low, 32), memcpy(&h, &high, 32);
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_cvtepu16_epi32(l), _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)));
}

/* 16 words of 32 numbers. */
INLINE AVX512_BF16 __m512 words_of(const float *from) {
    __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    __m512 words;
    memcpy(&words, &both, 64);
    return words;
}

TURN(turn_words, AVX512_BF16, words_of, 2) /* `count` words, a multiple of 16 */

AVX512_BF16 static void narrow_pack_b(const struct graft_matrix *b, int64_t k0, int64_t count, int64_t n0, int64_t columns,
                                      float *to, float *scratch) {
    const float *dense = (const float *)b->values + b->start;
    const int64_t words = (count + 1) / 2;
    if (b->along) {
        float *rows[2] = {scratch, scratch + MOST_N};
        for (int64_t k = 0; k < count; k += 2) {
            const float *row[2] = {dense + (k0 + k) * b->row + n0, dense + (k0 + k + 1) * b->row + n0};
            for (int j = 0; j < 2; j++) {
                if (k + j == count)
                    memset(rows[j], 0, sizeof(float) * (size_t)columns), row[j] = rows[j];
                else if (b->kind != GRAFT_FLOAT32)
                    graft_gemm_decode(b, k0 + k + j, n0, columns, rows[j]), row[j] = rows[j];
            }
            for (int64_t n = 0; n < columns; n += 16) {
                uint32_t left = columns - n < 16 ? (1u << (columns - n)) - 1 : 0xffff;
                __m512 word = pair(_mm512_maskz_loadu_ps((__mmask16)left, row[0] + n),
                                   _mm512_maskz_loadu_ps((__mmask16)left, row[1] + n));
                _mm512_storeu_ps(to + panel_of(n, NR, words) + k / 2 * NR + n % NR, word);
            }
            if ((columns - 1) % NR < 16) /* the panel's second half has no columns */
                _mm512_storeu_ps(to + panel_of(columns - 1, NR, words) + k / 2 * NR + 16, _mm512_setzero_ps());
        }
        return;
    }
    for (int64_t n = 0; n < columns; n += NR) {
        int rows = columns - n < NR ? (int)(columns - n) : NR;
        for (int i = 0; i < rows; i++) {
            float *row = scratch + i * MOST_K;
            if (b->kind == GRAFT_BFLOAT16) {
                memcpy(row, (const uint16_t *)b->values + b->start + (n0 + n + i) * b->row + k0, 2 * (size_t)count);
                if (count & 1) ((uint16_t *)row)[count] = 0;
                continue;
            }
            const float *from = dense + (n0 + n + i) * b->row + k0;
            if (b->kind != GRAFT_FLOAT32) graft_gemm_decode(b, n0 + n + i, k0, count, row), from = row;
            to_words(from, count, row); /* a word never lies behind the two values it is made of */
        }
        turn_panel(scratch, MOST_K, rows, words, to + panel_of(n, NR, words));
    }
}

AVX512_BF16 static void narrow_pack_a(const struct graft_matrix *a, int64_t m0, int64_t rows, int64_t k0, int64_t count,
                                      float *to, float *scratch) {
    const float *values = (const float *)a->values + a->start;
    const int64_t words = (count + 1) / 2;
    for (int64_t m = 0; m < rows; m += MR) {
        int here = rows - m < MR ? (int)(rows - m) : MR;
        float *panel = to + m * words;
        if (!a->along && count % 32 == 0) {
            turn_words(values + (m0 + m) * a->row + k0, a->row, here, words, panel, MR);
            continue;
        }
        if (!a->along) {
            for (int i = 0; i < here; i++) to_words(values + (m0 + m + i) * a->row + k0, count, scratch + i * MOST_K);
            turn(scratch, MOST_K, here, words, panel, MR);
            continue;
        }
        const __mmask16 mask = (__mmask16)((1u << here) - 1);
        for (int64_t k = 0; k < count; k += 2) {
            const float *row = values + (k0 + k) * a->row + m0 + m;
            __m512 next = k + 1 < count ? _mm512_maskz_loadu_ps(mask, row + a->row) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(panel + k / 2 * MR, 0x0fff, pair(_mm512_maskz_loadu_ps(mask, row), next));
        }
    }
}

/* ---- the kernel ---- */

#define MASK(t, j) ((__mmask16)((t)->mask >> 16 * (j)))

/* c + a b, for words c + a[0] b[0] + a[1] b[1]. */
INLINE AVX512 __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

INLINE AVX512_BF16 __m512 multiply_add_words(__m512 a, __m512 b, __m512 c) {
    __m512bh left, right;
    memcpy(&left, &a, 64), memcpy(&right, &b, 64);
    return _mm512_dpbf16_ps(c, left, right);
}

/* The sums of one tile. A macro, for a function cannot be inlined into others with different instruction sets.
 * `packed`: a_row is 1, a_column MR, and b_row NR, all known to the compiler; `masked`: not all columns are there. */
#define SUMS(name, set, multiply, rows, wide, packed, masked)                                                           \
set static void name(const struct tile *t) {                                                                            \
    __m512 c[MR][2];                                                                                                    \
    UNROLLED for (int i = 0; i < rows; i++) {                                                                           \
        c[i][0] = c[i][1] = _mm512_setzero_ps();                                                                        \
        UNROLLED for (int j = 0; j < wide; j++)                                                                         \
            __builtin_prefetch(t->c + i * t->c_row + 16 * j, 1); /* to be there when the sums are */                    \
    }                                                                                                                   \
    const float *b = t->b;                                                                                              \
    const int64_t a_row = packed ? 1 : t->a_row, a_column = packed ? MR : t->a_column, b_row = packed ? NR : t->b_row;  \
    const float *a[3] = {t->a, t->a + 4 * a_row, t->a + 8 * a_row};                                                     \
    for (int64_t k = 0; k < t->count; k++) {                                                                            \
        __m512 b0 = masked ? _mm512_maskz_loadu_ps(MASK(t, 0), b) : _mm512_loadu_ps(b), b1 = _mm512_setzero_ps();       \
        if (wide > 1) b1 = masked ? _mm512_maskz_loadu_ps(MASK(t, 1), b + 16) : _mm512_loadu_ps(b + 16);                \
        UNROLLED for (int i = 0; i < rows; i++) {                                                                       \
            __m512 value = _mm512_set1_ps(a[i / 4][i % 4 * a_row]);                                                     \
            c[i][0] = multiply(value, b0, c[i][0]);                                                                     \
            if (wide > 1) c[i][1] = multiply(value, b1, c[i][1]);                                                       \
        }                                                                                                               \
        a[0] += a_column, a[1] += a_column, a[2] += a_column, b += b_row;                                               \
    }                                                                                                                   \
    const __m512 alpha = _mm512_set1_ps(t->alpha);                                                                      \
    UNROLLED for (int i = 0; i < rows; i++) UNROLLED for (int j = 0; j < wide; j++) {                                   \
        float *to = t->c + i * t->c_row + 16 * j;                                                                       \
        const __mmask16 mask = masked ? MASK(t, j) : 0xffff;                                                            \
        __m512 old = t->add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();                                    \
        _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(alpha, c[i][j], old));                                          \
    }                                                                                                                   \
}

SUMS(packed_12, AVX512, multiply_add, 12, 2, 1, 0)
SUMS(packed_12_masked, AVX512, multiply_add, 12, 2, 1, 1)
SUMS(packed_8, AVX512, multiply_add, 8, 2, 1, 1)
SUMS(packed_4, AVX512, multiply_add, 4, 2, 1, 1)
SUMS(packed_1, AVX512, multiply_add, 1, 2, 1, 1)
SUMS(loose_12, AVX512, multiply_add, 12, 2, 0, 1)
SUMS(loose_12_narrow, AVX512, multiply_add, 12, 1, 0, 1)
SUMS(loose_4, AVX512, multiply_add, 4, 2, 0, 1)
SUMS(loose_1, AVX512, multiply_add, 1, 2, 0, 1)
SUMS(words_12, AVX512_BF16, multiply_add_words, 12, 2, 1, 0)
SUMS(words_12_masked, AVX512_BF16, multiply_add_words, 12, 2, 1, 1)
SUMS(words_4, AVX512_BF16, multiply_add_words, 4, 2, 1, 1)
SUMS(words_1, AVX512_BF16, multiply_add_words, 1, 2, 1, 1)

AVX512 static void multiply(struct tile *t, int rows, int columns, int packed, int narrow) {
    t->mask = columns >= NR ? 0xffffffffu : (1u << columns) - 1;
    if (narrow && rows == MR) {
        columns >= NR ? words_12(t) : words_12_masked(t);
        return;
    }
    while (narrow && rows > 0) {
        int here = rows >= 4 ? 4 : 1;
        here == 4 ? words_4(t) : words_1(t);
        t->a += here, t->c += here * t->c_row, rows -= here;
    }
    if (rows == MR && packed) {
        columns >= NR ? packed_12(t) : packed_12_masked(t);
        return;
    }
    if (rows == MR) {
        columns <= 16 ? loose_12_narrow(t) : loose_12(t);
        return;
    }
    while (rows > 0) {
        int here = packed && rows >= 8 ? 8 : rows >= 4 ? 4 : 1;
        if (packed)
            here == 8 ? packed_8(t) : here == 4 ? packed_4(t) : packed_1(t);
        else
            here == 4 ? loose_4(t) : loose_1(t);
        t->a += here * t->a_row, t->c += here * t->c_row, rows -= here;
    }
}

const struct gemm_set *graft_gemm_avx512(void) {
#define PLAIN                                                                                                          \
    .rows = MR, .columns = NR, .most_m = 40 * MR, .cut = cut, .turn_columns = turn_panel, .turn_rows = turn_rows,       \
    .copy_rows = copy_rows, .multiply = multiply
    static const struct gemm_set sets[2] = {{PLAIN}, {PLAIN, .narrow_pack_b = narrow_pack_b, .narrow_pack_a = narrow_pack_a}};
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return NULL;
    return &sets[__builtin_cpu_supports("avx512bf16") ? 1 : 0];
}

#else

const struct gemm_set *graft_gemm_avx512(void) { return NULL; }

#endif
