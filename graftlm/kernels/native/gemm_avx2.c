/* The matmul with AVX2: tiles of 6 x 16 sums in 12 of the 16 registers. See `gemm.h` for its parts. */
#include "gemm.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))

enum { MR = 6, NR = 16 };

/* ---- packing ---- */

/* Registers of eight rows of eight values -> of the eight columns. */
INLINE AVX2 void turn_8(__m256 r[8]) {
    __m256 t[8], u[8];
    UNROLLED for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

/* to[k * NR + i] = from[i * stride + k] for i < rows, k < count; zeros behind `rows`. */
AVX2 static void turn_panel(const float *from, int64_t stride, int rows, int64_t count, float *to) {
    int64_t k = 0;
    if (rows == NR)
        for (; k + 8 <= count; k += 8)
            for (int half = 0; half < NR; half += 8) {
                __m256 r[8];
                UNROLLED for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + (half + i) * stride + k);
                turn_8(r);
                UNROLLED for (int i = 0; i < 8; i++) _mm256_storeu_ps(to + (k + i) * NR + half, r[i]);
            }
    for (; k < count; k++)
        for (int i = 0; i < NR; i++) to[k * NR + i] = i < rows ? from[i * stride + k] : 0.0f;
}

/* to[k * MR + i] = from[i * stride + k] for i < rows, k < count; zeros behind `rows`. */
AVX2 static void turn_rows(const float *from, int64_t stride, int rows, int64_t count, float *to) {
    int64_t k = 0;
    if (rows == MR)
        for (; k + 8 <= count; k += 8) {
            __m256 r[8];
            UNROLLED for (int i = 0; i < MR; i++) r[i] = _mm256_loadu_ps(from + i * stride + k);
            r[6] = r[7] = _mm256_setzero_ps();
            turn_8(r);
            float *at = to + k * MR; /* each store writes two values too many, which the next one overwrites */
            UNROLLED for (int i = 0; i < 7; i++) _mm256_storeu_ps(at + i * MR, r[i]);
            _mm_storeu_ps(at + 7 * MR, _mm256_castps256_ps128(r[7]));
            _mm_storel_pi((__m64 *)(at + 7 * MR + 4), _mm256_extractf128_ps(r[7], 1));
        }
    for (; k < count; k++)
        for (int i = 0; i < MR; i++) to[k * MR + i] = i < rows ? from[i * stride + k] : 0.0f;
}

/* Lanes 8 * half .. of `mask` as AVX2's masked loads and stores want them: the sign of each lane. */
INLINE AVX2 __m256i lanes(uint32_t mask, int half) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i all = _mm256_set1_epi32((int)(mask >> (8 * half) & 0xff));
    return _mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit);
}

AVX2 static void cut(const float *row, int64_t length, int64_t k, int64_t count, float *to) {
    int64_t n = 0;
    float *at = to + k * NR;
    for (; n + NR <= length; n += NR, at += count * NR + GAP) {
        _mm256_storeu_ps(at, _mm256_loadu_ps(row + n));
        _mm256_storeu_ps(at + 8, _mm256_loadu_ps(row + n + 8));
    }
    for (int i = 0; n < length && i < NR; i++) at[i] = n + i < length ? row[n + i] : 0.0f;
}

AVX2 static void copy_rows(const float *from, int64_t stride, int here, int64_t count, float *to) {
    for (int64_t k = 0; k < count; k++, from += stride, to += MR) {
        if (here < MR) {
            for (int i = 0; i < MR; i++) to[i] = i < here ? from[i] : 0.0f;
            continue;
        }
        _mm_storeu_ps(to, _mm_loadu_ps(from));
        memcpy(to + 4, from + 4, 2 * sizeof(float));
    }
}

/* ---- the kernel ---- */

/* The sums of one tile. A macro, for a function cannot be inlined into others with different instruction sets.
 * `packed`: a_row is 1, a_column MR, and b_row NR, all known to the compiler; `masked`: not all columns are there. */
#define SUMS(name, rows, wide, packed, masked)                                                                          \
AVX2 static void name(const struct tile *t) {                                                                           \
    __m256 c[MR][2];                                                                                                    \
    UNROLLED for (int i = 0; i < rows; i++) c[i][0] = c[i][1] = _mm256_setzero_ps();                                    \
    const __m256i mask[2] = {lanes(t->mask, 0), lanes(t->mask, 1)};                                                     \
    const float *b = t->b;                                                                                              \
    const int64_t a_row = packed ? 1 : t->a_row, a_column = packed ? MR : t->a_column, b_row = packed ? NR : t->b_row;  \
    const float *a[2] = {t->a, t->a + 3 * a_row};                                                                       \
    for (int64_t k = 0; k < t->count; k++) {                                                                            \
        __m256 b0 = masked && !packed ? _mm256_maskload_ps(b, mask[0]) : _mm256_loadu_ps(b), b1 = b0;                   \
        if (wide > 1) b1 = masked && !packed ? _mm256_maskload_ps(b + 8, mask[1]) : _mm256_loadu_ps(b + 8);             \
        UNROLLED for (int i = 0; i < rows; i++) {                                                                       \
            __m256 value = _mm256_broadcast_ss(a[i / 3] + i % 3 * a_row);                                               \
            c[i][0] = _mm256_fmadd_ps(value, b0, c[i][0]);                                                              \
            if (wide > 1) c[i][1] = _mm256_fmadd_ps(value, b1, c[i][1]);                                                \
        }                                                                                                               \
        a[0] += a_column, a[1] += a_column, b += b_row;                                                                 \
    }                                                                                                                   \
    const __m256 alpha = _mm256_set1_ps(t->alpha);                                                                      \
    UNROLLED for (int i = 0; i < rows; i++) UNROLLED for (int j = 0; j < wide; j++) {                                   \
        float *to = t->c + i * t->c_row + 8 * j;                                                                        \
        __m256 old = _mm256_setzero_ps();                                                                               \
        if (t->add) old = masked ? _mm256_maskload_ps(to, mask[j]) : _mm256_loadu_ps(to);                               \
        __m256 sum = _mm256_fmadd_ps(alpha, c[i][j], old);                                                              \
        masked ? _mm256_maskstore_ps(to, mask[j], sum) : _mm256_storeu_ps(to, sum);                                     \
    }                                                                                                                   \
}

SUMS(packed_6, 6, 2, 1, 0)
SUMS(packed_6_masked, 6, 2, 1, 1)
SUMS(packed_4, 4, 2, 1, 1)
SUMS(packed_1, 1, 2, 1, 1)
SUMS(loose_6, 6, 2, 0, 1)
SUMS(loose_6_narrow, 6, 1, 0, 1)
SUMS(loose_4, 4, 2, 0, 1)
SUMS(loose_1, 1, 2, 0, 1)

AVX2 static void multiply(struct tile *t, int rows, int columns, int packed, int narrow) {
    (void)narrow;
    t->mask = columns >= NR ? 0xffff : (1u << columns) - 1;
    while (rows > 0) {
        int here = rows >= MR ? MR : rows >= 4 ? 4 : 1;
        if (here == MR && packed)
            columns >= NR ? packed_6(t) : packed_6_masked(t);
        else if (here == MR)
            columns <= 8 ? loose_6_narrow(t) : loose_6(t);
        else if (packed)
            here == 4 ? packed_4(t) : packed_1(t);
        else
            here == 4 ? loose_4(t) : loose_1(t);
        t->a += here * t->a_row, t->c += here * t->c_row, rows -= here;
    }
}

const struct gemm_set *graft_gemm_avx2(void) {
    static const struct gemm_set set = {.rows = MR, .columns = NR, .most_m = 32 * MR, .cut = cut, .turn_columns = turn_panel,
                                        .turn_rows = turn_rows, .copy_rows = copy_rows, .multiply = multiply};
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &set : NULL;
}

#else

const struct gemm_set *graft_gemm_avx2(void) { return NULL; }

#endif
