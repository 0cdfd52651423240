/* Matrix products of our own, where PyTorch's library leaves half of the processor idle: AVX-512 on processors that are
 * not Intel's, on which MKL uses 256-bit registers (measured on an EPYC of 2024: 107 of 263 GFLOP/s a core; this file 215).
 *
 *     C (M, N) [+]= alpha * sum over terms of A (M, K) B (K, N)          all in float32
 *
 * B may be a stored weight, in either orientation: it is decoded while it is packed, so a product with 4-bit codes costs
 * what a dense one does. A second term with its own K puts an adapter's narrow product into the same pass over C.
 *
 * The shape of it is that of Goto and van de Geijn (2008): K is cut into pieces of at most MOST_K; of B a piece is packed
 * in panels of 32 columns, of A in panels of 12 rows that stay in the second-level cache, and a kernel keeps 12 x 32 sums
 * in 24 registers. Narrow operands that would be used for one or two panels only are read where they lie.
 * A product may be `narrow`: both sides are rounded to bfloat16 as they are packed, two values of k beside each other in a
 * 32-bit word, and AVX-512's bfloat16 instruction multiplies twice as many pairs in the same time, summed in float32.
 * Every element of C is summed in the same order whatever the number of threads.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* madvise */
#endif
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <cpuid.h>
#include <immintrin.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512_BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

enum { MR = 12, NR = 32, MOST_K = 256, MOST_M = 40 * MR, MOST_N = 1024, SPAN = 64 };
/* SPAN: pieces of N and K begin at multiples of it, where the 64-value blocks of a stored weight begin. */

/* ---- memory that outlives a call, so that its pages are there already ---- */

struct workspace {
    float *a;    /* MOST_M x MOST_K */
    float *b;    /* MOST_N x MOST_K */
    float *rows; /* decoded rows of a stored weight: MOST_N values, or NR x MOST_K */
};

enum { WORKSPACES = 256, A_VALUES = MOST_M * MOST_K, B_VALUES = MOST_N * MOST_K, ROW_VALUES = NR * MOST_K };
static _Atomic(void *) idle[WORKSPACES];

static float *borrow(void) {
    for (int i = 0; i < WORKSPACES; i++) {
        void *found = atomic_exchange(&idle[i], NULL);
        if (found) return found;
    }
    const size_t page = 1 << 21, bytes = sizeof(float) * (A_VALUES + B_VALUES + ROW_VALUES);
    void *made = aligned_alloc(page, (bytes + page - 1) / page * page);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (made) madvise(made, bytes, MADV_HUGEPAGE);
#endif
    return made;
}

static void give_back(float *memory) {
    for (int i = 0; i < WORKSPACES; i++) {
        void *empty = NULL;
        if (atomic_compare_exchange_strong(&idle[i], &empty, memory)) return;
    }
    free(memory);
}

/* ---- packing ---- */

/* to[k * width + i] = from[i * stride + k] for i < rows, k < count, `width` a multiple of 4 with zeros behind `rows`:
 * blocks of 4 x 16 values are turned within registers. */
AVX512 static void turn(const float *from, int64_t stride, int rows, int64_t count, float *to, const int width) {
    for (int i = 0; i < width; i += 4) {
        const float *p[4];
        int here = rows - i;
        for (int j = 0; j < 4; j++) p[j] = from + (i + (j < here ? j : 0)) * stride; /* beyond: any row, not used */
        if (here <= 0) {
            for (int64_t k = 0; k < count; k++) _mm_storeu_ps(to + k * width + i, _mm_setzero_ps());
            continue;
        }
        int64_t k = 0;
        for (; k + 16 <= count; k += 16) {
            __m512 r0 = _mm512_loadu_ps(p[0] + k), r1 = here > 1 ? _mm512_loadu_ps(p[1] + k) : _mm512_setzero_ps();
            __m512 r2 = here > 2 ? _mm512_loadu_ps(p[2] + k) : _mm512_setzero_ps();
            __m512 r3 = here > 3 ? _mm512_loadu_ps(p[3] + k) : _mm512_setzero_ps();
            __m512 t0 = _mm512_unpacklo_ps(r0, r1), t1 = _mm512_unpackhi_ps(r0, r1);
            __m512 t2 = _mm512_unpacklo_ps(r2, r3), t3 = _mm512_unpackhi_ps(r2, r3);
            __m512 c[4]; /* 128-bit lane l of c[j] holds values k + 4 l + j */
            c[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t0), _mm512_castps_pd(t2)));
            c[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t0), _mm512_castps_pd(t2)));
            c[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t1), _mm512_castps_pd(t3)));
            c[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t1), _mm512_castps_pd(t3)));
            UNROLLED for (int j = 0; j < 4; j++) {
                float *at = to + (k + j) * width + i;
                _mm_storeu_ps(at, _mm512_castps512_ps128(c[j]));
                _mm_storeu_ps(at + 4 * width, _mm512_extractf32x4_ps(c[j], 1));
                _mm_storeu_ps(at + 8 * width, _mm512_extractf32x4_ps(c[j], 2));
                _mm_storeu_ps(at + 12 * width, _mm512_extractf32x4_ps(c[j], 3));
            }
        }
        for (; k < count; k++)
            for (int j = 0; j < 4; j++) to[k * width + i + j] = j < here ? p[j][k] : 0.0f;
    }
}

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

/* `count` rows of `columns` values each, `stride` apart, into panels of NR columns that are `count` x NR long. */
AVX512 static void cut(const float *row, int64_t columns, int64_t k, int64_t count, float *to) {
    int64_t n = 0;
    for (; n + NR <= columns; n += NR) {
        float *at = to + n * count + k * NR;
        _mm512_storeu_ps(at, _mm512_loadu_ps(row + n));
        _mm512_storeu_ps(at + 16, _mm512_loadu_ps(row + n + 16));
    }
    if (n < columns) {
        float *at = to + n * count + k * NR;
        uint32_t mask = (1u << (columns - n)) - 1;
        _mm512_storeu_ps(at, _mm512_maskz_loadu_ps((__mmask16)mask, row + n));
        _mm512_storeu_ps(at + 16, _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), row + n + 16));
    }
}

/* Values first .. first + count of row `row` of a weight, as float32. */
AVX512 static void decode(const struct graft_matrix *w, int64_t row, int64_t first, int64_t count, float *to) {
    int64_t at = w->start + row * w->row + first;
    if (w->kind == GRAFT_NF4) {
        graft_nf4_range(w->values, w->absmax, w->scale, *w->offset, at, at + count, to);
    } else if (w->kind == GRAFT_INT8) {
        graft_int8_range((const int8_t *)w->values + at, w->scale[row], count, to);
    } else { /* bfloat16 */
        const uint16_t *from = (const uint16_t *)w->values + at;
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) {
            __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + i)));
            _mm512_storeu_ps(to + i, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
        }
        for (; i < count; i++) to[i] = float_of((uint32_t)from[i] << 16);
    }
}

/* B[k0 .. k0 + count, n0 .. n0 + columns] into panels. A weight (rows, row) is B itself when `along` (its rows are the k),
 * else B is the weight turned. */
AVX512 static void pack_b(const struct graft_matrix *b, int64_t k0, int64_t count, int64_t n0, int64_t columns, float *to,
                          float *scratch) {
    const float *dense = (const float *)b->values + b->start;
    if (b->along) {
        for (int64_t k = 0; k < count; k++) {
            const float *row = dense + (k0 + k) * b->row + n0;
            if (b->kind != GRAFT_FLOAT32) {
                decode(b, k0 + k, n0, columns, scratch);
                row = scratch;
            }
            cut(row, columns, k, count, to);
        }
        return;
    }
    for (int64_t n = 0; n < columns; n += NR) {
        int rows = columns - n < NR ? (int)(columns - n) : NR;
        const float *first = dense + (n0 + n) * b->row + k0;
        int64_t stride = b->row;
        if (b->kind != GRAFT_FLOAT32) {
            for (int i = 0; i < rows; i++) decode(b, n0 + n + i, k0, count, scratch + i * MOST_K);
            first = scratch, stride = MOST_K;
        }
        turn_panel(first, stride, rows, count, to + n * count);
    }
}

/* A[m0 .. m0 + rows, k0 .. k0 + count] into panels of MR rows; A's rows are k when `along`, as for B. */
AVX512 static void pack_a(const struct graft_matrix *a, int64_t m0, int64_t rows, int64_t k0, int64_t count, float *to) {
    const float *values = (const float *)a->values + a->start;
    for (int64_t m = 0; m < rows; m += MR) {
        int here = rows - m < MR ? (int)(rows - m) : MR;
        float *panel = to + m * count;
        if (!a->along) { /* (M, K) */
            turn(values + (m0 + m) * a->row + k0, a->row, here, count, panel, MR);
            continue;
        }
        const __mmask16 mask = (__mmask16)((1u << here) - 1);
        for (int64_t k = 0; k < count; k++) /* (K, M) */
            _mm512_mask_storeu_ps(panel + k * MR, 0x0fff, _mm512_maskz_loadu_ps(mask, values + (k0 + k) * a->row + m0 + m));
    }
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
                    decode(b, k0 + k + j, n0, columns, rows[j]), row[j] = rows[j];
            }
            for (int64_t n = 0; n < columns; n += 16) {
                uint32_t left = columns - n < 16 ? (1u << (columns - n)) - 1 : 0xffff;
                __m512 word = pair(_mm512_maskz_loadu_ps((__mmask16)left, row[0] + n),
                                   _mm512_maskz_loadu_ps((__mmask16)left, row[1] + n));
                _mm512_storeu_ps(to + n / NR * NR * words + k / 2 * NR + n % NR, word);
            }
            if ((columns - 1) % NR < 16) /* the panel's second half has no columns */
                _mm512_storeu_ps(to + (columns - 1) / NR * NR * words + k / 2 * NR + 16, _mm512_setzero_ps());
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
            if (b->kind != GRAFT_FLOAT32) decode(b, n0 + n + i, k0, count, row), from = row;
            to_words(from, count, row); /* a word never lies behind the two values it is made of */
        }
        turn_panel(scratch, MOST_K, rows, words, to + n * words);
    }
}

AVX512_BF16 static void narrow_pack_a(const struct graft_matrix *a, int64_t m0, int64_t rows, int64_t k0, int64_t count,
                                      float *to, float *scratch) {
    const float *values = (const float *)a->values + a->start;
    const int64_t words = (count + 1) / 2;
    for (int64_t m = 0; m < rows; m += MR) {
        int here = rows - m < MR ? (int)(rows - m) : MR;
        float *panel = to + m * words;
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

struct tile {
    int64_t count;         /* k */
    const float *a;        /* A[i, k] at a[i * a_row + k * a_column] */
    int64_t a_row, a_column;
    const float *b;        /* B[k, ..] at b + k * b_row */
    int64_t b_row;
    float *c;              /* C[i, ..] at c + i * c_row */
    int64_t c_row;
    __mmask16 mask[2];     /* which of the 32 columns there are */
    float alpha;
    int add;               /* to what C holds */
};

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
    UNROLLED for (int i = 0; i < rows; i++) c[i][0] = c[i][1] = _mm512_setzero_ps();                                    \
    const float *b = t->b;                                                                                              \
    const int64_t a_row = packed ? 1 : t->a_row, a_column = packed ? MR : t->a_column, b_row = packed ? NR : t->b_row;  \
    const float *a[3] = {t->a, t->a + 4 * a_row, t->a + 8 * a_row};                                                     \
    for (int64_t k = 0; k < t->count; k++) {                                                                            \
        __m512 b0 = masked ? _mm512_maskz_loadu_ps(t->mask[0], b) : _mm512_loadu_ps(b), b1 = _mm512_setzero_ps();       \
        if (wide > 1) b1 = masked ? _mm512_maskz_loadu_ps(t->mask[1], b + 16) : _mm512_loadu_ps(b + 16);                \
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
        const __mmask16 mask = masked ? t->mask[j] : 0xffff;                                                            \
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

/* Rows 0 .. rows <= MR of one panel. */
AVX512 static void panel(struct tile t, int rows, int columns, int packed, int narrow) {
    uint32_t mask = columns >= NR ? 0xffffffffu : (1u << columns) - 1;
    t.mask[0] = (__mmask16)mask, t.mask[1] = (__mmask16)(mask >> 16);
    if (narrow && rows == MR) {
        columns >= NR ? words_12(&t) : words_12_masked(&t);
        return;
    }
    while (narrow && rows > 0) {
        int here = rows >= 4 ? 4 : 1;
        here == 4 ? words_4(&t) : words_1(&t);
        t.a += here, t.c += here * t.c_row, rows -= here;
    }
    if (rows == MR && packed) {
        columns >= NR ? packed_12(&t) : packed_12_masked(&t);
        return;
    }
    if (rows == MR) {
        columns <= 16 ? loose_12_narrow(&t) : loose_12(&t);
        return;
    }
    while (rows > 0) {
        int here = packed && rows >= 8 ? 8 : rows >= 4 ? 4 : 1;
        if (packed)
            here == 8 ? packed_8(&t) : here == 4 ? packed_4(&t) : packed_1(&t);
        else
            here == 4 ? loose_4(&t) : loose_1(&t);
        t.a += here * t.a_row, t.c += here * t.c_row, rows -= here;
    }
}

/* ---- the product ---- */

struct product {
    const struct graft_matrix *a, *b;
    const int64_t *k;
    int terms;
    int64_t m, n;
    float *c;
    int64_t c_row;
    float alpha;
    int add;
    int64_t m_step, n_step; /* what one piece covers */
    int64_t n_pieces;
    atomic_int failed;
};

static int64_t even_step(int64_t length, int64_t most, int64_t unit) { /* equal steps of at most `most`, in units */
    int64_t steps = (length + most - 1) / most;
    if (steps < 1) steps = 1;
    int64_t step = (length + steps - 1) / steps;
    return (step + unit - 1) / unit * unit;
}

static int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

AVX512 static void rectangle(const struct product *p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float *memory) {
    float *packed_a = memory, *packed_b = memory + A_VALUES, *scratch = memory + A_VALUES + B_VALUES;
    const int64_t m_step = even_step(m1 - m0, MOST_M, MR), n_step = even_step(n1 - n0, MOST_N, SPAN);
    for (int64_t n = n0; n < n1; n += n_step) {
        const int64_t columns = least(n_step, n1 - n);
        int add = p->add;
        for (int term = 0; term < p->terms; term++) {
            const struct graft_matrix *a = p->a + term, *b = p->b + term;
            /* Packing pays where what is packed is read often enough. */
            const int narrow = b->narrow && p->n > 2 * NR && p->m > 2 * MR; /* whatever this thread's share of it */
            const int loose_a = !narrow && columns <= 2 * NR, loose_b = !narrow && b->kind == GRAFT_FLOAT32 && b->along && m1 - m0 <= 2 * MR;
            const int64_t k_step = even_step(p->k[term], MOST_K, SPAN);
            for (int64_t k = 0; k < p->k[term]; k += k_step) {
                const int64_t count = least(k_step, p->k[term] - k);
                const int64_t words = narrow ? (count + 1) / 2 : count;
                if (narrow)
                    narrow_pack_b(b, k, count, n, columns, packed_b, scratch);
                else if (!loose_b)
                    pack_b(b, k, count, n, columns, packed_b, scratch);
                for (int64_t m = m0; m < m1; m += m_step) {
                    const int64_t rows = least(m_step, m1 - m);
                    if (narrow)
                        narrow_pack_a(a, m, rows, k, count, packed_a, scratch);
                    else if (!loose_a)
                        pack_a(a, m, rows, k, count, packed_a);
                    for (int64_t j = 0; j < columns; j += NR)
                        for (int64_t i = 0; i < rows; i += MR) {
                            const float *from = (const float *)a->values + a->start;
                            struct tile t = {.count = words, .c = p->c + (m + i) * p->c_row + n + j, .c_row = p->c_row,
                                             .alpha = p->alpha, .add = add};
                            if (!loose_a) {
                                t.a = packed_a + i * words, t.a_row = 1, t.a_column = MR;
                            } else if (a->along) {
                                t.a = from + k * a->row + m + i, t.a_row = 1, t.a_column = a->row;
                            } else {
                                t.a = from + (m + i) * a->row + k, t.a_row = a->row, t.a_column = 1;
                            }
                            if (loose_b) {
                                t.b = (const float *)b->values + b->start + k * b->row + n + j, t.b_row = b->row;
                            } else {
                                t.b = packed_b + j * words, t.b_row = NR;
                            }
                            panel(t, least(MR, rows - i), least(NR, columns - j), !loose_a && !loose_b, narrow);
                        }
                }
                add = 1;
            }
        }
    }
}

static void piece(void *context, int64_t first, int64_t last) {
    struct product *p = context;
    float *memory = borrow();
    if (!memory) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (int64_t i = first; i < last; i++) {
        int64_t m0 = i / p->n_pieces * p->m_step, n0 = i % p->n_pieces * p->n_step;
        int64_t m1 = m0 + p->m_step < p->m ? m0 + p->m_step : p->m, n1 = n0 + p->n_step < p->n ? n0 + p->n_step : p->n;
        if (m0 < m1 && n0 < n1) rectangle(p, m0, m1, n0, n1, memory);
    }
    give_back(memory);
}

/* Whether this processor has AVX-512 (1), and PyTorch's library is known not to use all of it (2). */
EXPORT int graft_gemm_level(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return 0;
    return __builtin_cpu_is("intel") ? 1 : 2;
}

/* Whether this processor multiplies bfloat16 words. */
EXPORT int graft_gemm_narrow(void) {
    __builtin_cpu_init();
    return graft_gemm_level() > 0 && __builtin_cpu_supports("avx512bf16");
}

/* C (m, n), rows `c_row` apart: = or, with `add`, += alpha * sum over terms of A_t (m, k_t) B_t (k_t, n). 1 without memory, else 0. */
EXPORT int graft_gemm(int64_t m, int64_t n, const int64_t *k, int terms, const struct graft_matrix *a,
                      const struct graft_matrix *b, float *c, int64_t c_row, float alpha, int add, int threads) {
    if (m <= 0 || n <= 0) return 0;
    struct product p = {.a = a, .b = b, .k = k, .terms = terms, .m = m, .n = n, .c = c, .c_row = c_row, .alpha = alpha, .add = add};
    int64_t all = 0;
    for (int i = 0; i < terms; i++) all += k[i];
    double work = (double)m * (double)n * (double)all;
    if (work < 2e5) threads = 1;
    if (threads < 1) threads = 1;
    /* One piece a thread, along the longer side: what the other side packs, each thread packs for itself. */
    if (n >= m || n >= threads * 4 * SPAN) {
        p.n_step = even_step(n, (n + threads - 1) / threads, threads > 1 && n < threads * SPAN ? NR : SPAN), p.m_step = m;
    } else {
        p.m_step = even_step(m, (m + threads - 1) / threads, MR), p.n_step = n;
    }
    p.n_pieces = (n + p.n_step - 1) / p.n_step;
    int64_t pieces = p.n_pieces * ((m + p.m_step - 1) / p.m_step);
    graft_parallel(pieces, 1, threads, piece, &p);
    return atomic_load(&p.failed);
}

#else

EXPORT int graft_gemm_level(void) { return 0; }

EXPORT int graft_gemm_narrow(void) { return 0; }

EXPORT int graft_gemm(int64_t m, int64_t n, const int64_t *k, int terms, const struct graft_matrix *a,
                      const struct graft_matrix *b, float *c, int64_t c_row, float alpha, int add, int threads) {
    (void)m, (void)n, (void)k, (void)terms, (void)a, (void)b, (void)c, (void)c_row, (void)alpha, (void)add, (void)threads;
    return 1;
}

#endif
