/* Decoding: matmul of few rows with a dense weight, each row's own adapter, and attention of one new token.
 *
 * A matrix library is made for many rows. For one row (or eight) the weight is read once and used a few times, so the
 * memory's speed is the limit, and PyTorch first upcasts a copy of a 16-bit weight. Here the weight is
 * read as it is stored, by all threads, and upcast in registers.
 *
 * Every result is summed in an order that depends on the shapes of its own row alone: a request's numbers are the same
 * bits whoever shares its batch.
 *
 * Letters: x (rows, in), W (out, in), y (rows, out), A (r, in), B (r, out) with an adapter's second factor turned.
 */
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "rows.h"

enum { AHEAD = 4096, ROWS_OF_B = 4 };
/* AHEAD: bytes of W fetched ahead: rows are short, and the processor's own prefetching stops at their ends. ROWS_OF_B: read
 * side by side. */

/* ---- four lanes: what every compiler makes something good of, NEON included ---- */

#define NAME(x) plain_##x
#define TARGET
#define LANES 4
#define OUTS 1
#define FMA(a, b, c) ((a) * (b) + (c))
#define TOTALS(v, n, to) \
    for (int t_ = 0; t_ < (n); t_++) (to)[t_] = ((v)[t_][0] + (v)[t_][2]) + ((v)[t_][1] + (v)[t_][3])
#include "rows.inc"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

/* ---- AVX2 ---- */

#define AVX2 __attribute__((target("avx2,fma,f16c")))

/* The sums of eight registers' lanes at once; one register's sum is taken in the same order. */
INLINE AVX2 __m256 avx2_eight(const __m256 *v) {
    __m256 pair[4], four[2];
    UNROLLED for (int i = 0; i < 4; i++)
        pair[i] = _mm256_add_ps(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLLED for (int i = 0; i < 2; i++) {
        __m256d a = _mm256_castps_pd(pair[2 * i]), b = _mm256_castps_pd(pair[2 * i + 1]);
        four[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

INLINE AVX2 void avx2_totals(const __m256 *v, int n, float *to) {
    if (n == 8) {
        _mm256_storeu_ps(to, avx2_eight(v));
        return;
    }
    UNROLLED for (int i = 0; i < n; i++) {
        __m256 pair = _mm256_add_ps(v[i], _mm256_permute_ps(v[i], 0x4e)); /* lanes 0 + 2 and 1 + 3 */
        __m256 four = _mm256_add_ps(pair, _mm256_permute_ps(pair, 0xb1));
        to[i] = _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    }
}

#define NAME(x) avx2_##x
#define TARGET AVX2
#define LANES 8
#define OUTS 1
#define FMA(a, b, c) ((avx2_vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define TOTALS(v, n, to) avx2_totals((const __m256 *)(v), n, to)
#include "rows.inc"

/* ---- AVX-512 ---- */

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))

INLINE AVX512 __m512 avx512_sixteen(const __m512 *v) {
    __m512 pair[8], four[4], eight[2];
    UNROLLED for (int i = 0; i < 8; i++)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLLED for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    UNROLLED for (int i = 0; i < 2; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

INLINE AVX512 void avx512_totals(const __m512 *v, int n, float *to) {
    if (n == 16) {
        _mm512_storeu_ps(to, avx512_sixteen(v));
        return;
    }
    UNROLLED for (int i = 0; i < n; i++) {
        __m512 pair = _mm512_add_ps(v[i], _mm512_permute_ps(v[i], 0x4e));
        __m512 four = _mm512_add_ps(pair, _mm512_permute_ps(pair, 0xb1));
        __m512 eight = _mm512_add_ps(four, _mm512_shuffle_f32x4(four, four, 0xb1)); /* quarters 0 + 1 and 2 + 3 */
        to[i] = _mm512_cvtss_f32(_mm512_add_ps(eight, _mm512_shuffle_f32x4(eight, eight, 0x4e)));
    }
}

#define NAME(x) avx512_##x
#define TARGET AVX512
#define LANES 16
#define OUTS 2
#define FMA(a, b, c) ((avx512_vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define TOTALS(v, n, to) avx512_totals((const __m512 *)(v), n, to)
#include "rows.inc"

static const struct row_primitives *const sets[] = {&plain_rows, &avx2_rows, &avx512_rows};
#else
static const struct row_primitives *const sets[] = {&plain_rows, &plain_rows, &plain_rows};
#endif

const struct row_primitives *use_rows = &plain_rows;

void graft_rows_choose(int choice) { use_rows = sets[choice]; }

enum { TOGETHER = 32, MOST_IN = 1024, VALUES_PER_PIECE = 1 << 15 };
/* TOGETHER: rows of W that meet all rows of x while they are in the cache. MOST_IN: values of x's rows at once. */

/* ---- y = x W^T, W in 32 or 16 bits ---- */

struct dense_job {
    const char *w;
    int type;
    int64_t in, out;
    const float *x;
    int64_t stride, rows;
    float *y;
};

static void dense_rows(void *context, int64_t first_row, int64_t last_row) {
    const struct dense_job *job = context;
    int64_t pieces = (job->in + MOST_IN - 1) / MOST_IN, piece = ((job->in + pieces - 1) / pieces + 15) / 16 * 16;
    for (int64_t tile = first_row; tile < last_row; tile += TOGETHER) {
        int outs = (int)(last_row - tile < TOGETHER ? last_row - tile : TOGETHER);
        for (int64_t k = 0; k < job->rows; k += MAX_ROWS) {
            int rows = (int)(job->rows - k < MAX_ROWS ? job->rows - k : MAX_ROWS);
            float sums[TOGETHER * MAX_ROWS] = {0};
            for (int64_t i = 0; i < job->in; i += piece) {
                int64_t n = job->in - i < piece ? job->in - i : piece;
                use_rows->dots(job->w + (tile * job->in + i) * float_bytes(job->type), job->in, job->type, n, outs,
                               job->x + k * job->stride + i, job->stride, rows, sums);
            }
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < outs; o++) job->y[(k + r) * job->out + tile + o] = sums[o * MAX_ROWS + r];
        }
    }
}

/* y (rows, out) = x W^T in float32; W (out, in) of `type` (32 bits or bfloat16), rows of x `stride` apart. */
EXPORT void graft_dense_rows(const void *w, int type, int64_t out, int64_t in, const float *x, int64_t stride,
                             int64_t rows, float *y, int threads) {
    struct dense_job job = {w, type, in, out, x, stride, rows, y};
    int64_t grain = VALUES_PER_PIECE / (in > 0 ? in : 1);
    grain = grain < 2 ? 2 : grain / 2 * 2;
    if (in > 0) graft_parallel(out, grain, threads, dense_rows, &job);
    else memset(y, 0, sizeof(float) * (size_t)(rows * out));
}

/* ---- y += s (x A^T) B, each range of rows with its own A and B ---- */

struct route_job {
    const int64_t *ranges; /* first row of x and one past the last, for each */
    const struct factors *const *factors;
    int64_t in, out, stride;
    const float *x;
    float *y;
    int64_t count;
    const int64_t *first_piece; /* (count + 1,): pieces of MAX_ROWS rows before each route */
    float *h;                   /* (pieces, MAX_ROWS * most rank): a scratch */
    int64_t h_size;
};

static void route_pieces(void *context, int64_t first, int64_t last) {
    const struct route_job *job = context;
    int64_t at = 0;
    for (int64_t piece = first; piece < last; piece++) {
        while (job->first_piece[at + 1] <= piece) at++;
        const struct factors *route = job->factors[at];
        int64_t row = job->ranges[2 * at] + (piece - job->first_piece[at]) * MAX_ROWS, r = route->rank;
        int64_t left = job->ranges[2 * at + 1] - row;
        int rows = (int)(left < MAX_ROWS ? left : MAX_ROWS);
        float *h = job->h + piece * job->h_size; /* (rows, r) */
        for (int64_t j = 0; j < r; j += TOGETHER) {
            int outs = (int)(r - j < TOGETHER ? r - j : TOGETHER);
            float sums[TOGETHER * MAX_ROWS] = {0};
            use_rows->dots((const char *)route->A + j * job->in * float_bytes((int)route->a_type), job->in,
                           (int)route->a_type, job->in, outs, job->x + row * job->stride, job->stride, rows, sums);
            for (int k = 0; k < rows; k++)
                for (int o = 0; o < outs; o++) h[k * r + j + o] = sums[o * MAX_ROWS + k] * (float)route->scale;
        }
        use_rows->spread(route->B, (int)route->b_type, r, job->out, h, rows, job->y + row * job->out, job->out);
    }
}

/* y (rows, out) += scale (x A^T) B for `count` disjoint ranges of rows; 1 when there was no memory for h, else 0. */
EXPORT int graft_routed_rows(const int64_t *ranges, const struct factors *const *factors, int64_t count, int64_t in, int64_t out, const float *x,
                             int64_t stride, float *y, int threads) {
    int64_t few[65], *first_piece = count <= 64 ? few : malloc(sizeof(int64_t) * (size_t)(count + 1)), most = 0, values = 0;
    if (!first_piece) return 1;
    first_piece[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t rows = ranges[2 * i + 1] - ranges[2 * i];
        first_piece[i + 1] = first_piece[i] + (rows + MAX_ROWS - 1) / MAX_ROWS;
        if (factors[i]->rank > most) most = factors[i]->rank;
        values += rows * factors[i]->rank * (in + out);
    }
    int64_t pieces = first_piece[count];
    float *h = malloc(sizeof(float) * (size_t)(pieces * MAX_ROWS * most + 1));
    if (h) {
        struct route_job job = {ranges, factors, in, out, stride, x, y, count, first_piece, h, MAX_ROWS * most};
        int64_t grain = values > 0 ? VALUES_PER_PIECE * pieces / values : pieces;
        graft_parallel(pieces, grain < 1 ? 1 : grain, threads, route_pieces, &job);
    }
    free(h);
    if (first_piece != few) free(first_piece);
    return h == NULL;
}

/* ---- attention of single new tokens over keys and values kept in blocks ---- */

int64_t graft_attend_scratch(int64_t block) {
    int64_t padded = (block + 15) / 16 * 16;
    return 2 * MAX_ROWS * padded; /* (heads, block) scores, (block, heads) sums */
}

void graft_attend_one(const struct attention *a, int64_t head, int64_t visible, const int64_t *table, const float *queries,
                      const float *keys, const float *values, float *outs, float *scratch) {
    const int64_t groups = a->heads / a->key_heads, padded = (a->block + 15) / 16 * 16;
    const int64_t key_stride = a->key_heads * a->width, value_stride = a->key_heads * a->value_width;
    int64_t start = a->window && visible > a->window ? visible - a->window : 0;
    float *scores = scratch, *sums = scores + MAX_ROWS * padded;
    for (int64_t g = 0; g < groups; g += MAX_ROWS) {
        int count = (int)(groups - g < MAX_ROWS ? groups - g : MAX_ROWS);
        const float *q = queries + (head * groups + g) * a->query_head;
        float *out = outs + (head * groups + g) * a->value_width;
        float most[MAX_ROWS], total[MAX_ROWS] = {0};
        for (int k = 0; k < count; k++) most[k] = -INFINITY;
        memset(out, 0, sizeof(float) * (size_t)(count * a->value_width));
        for (int64_t b = start / a->block; b * a->block < visible; b++) {
            int64_t from = b * a->block < start ? start - b * a->block : 0;
            int64_t to = visible - b * a->block < a->block ? visible - b * a->block : a->block, n = to - from;
            int64_t at = table[b] * a->block + from;
            memset(sums, 0, sizeof(float) * (size_t)(n * MAX_ROWS));
            use_rows->dots(keys + at * key_stride + head * a->width, key_stride, FLOAT32, a->width, (int)n, q, a->query_head,
                           count, sums);
            for (int k = 0; k < count; k++) {
                float *mine = scores + k * padded, high = most[k];
                for (int64_t j = 0; j < n; j++) {
                    float score = sums[j * MAX_ROWS + k] * (float)a->scale;
                    if (a->softcap) score = tanhf(score / (float)a->softcap) * (float)a->softcap;
                    mine[j] = score;
                    if (score > high) high = score;
                }
                for (int64_t j = n; j < (n + 15) / 16 * 16; j++) mine[j] = -INFINITY;
                float keep = most[k] == -INFINITY ? 0.0f : expf(most[k] - high);
                total[k] = total[k] * keep + use_rows->exps(mine, (n + 15) / 16 * 16, high);
                most[k] = high;
                use_rows->mix(out + k * a->value_width, keep, mine, n,
                              values + at * value_stride + head * a->value_width, value_stride, a->value_width);
            }
        }
        for (int k = 0; k < count; k++)
            for (int64_t d = 0; d < a->value_width; d++) out[k * a->value_width + d] /= total[k];
    }
}

struct attention_job {
    const struct attention *a;
    const float *q, *keys, *values;
    float *out;
    float *scratch; /* for each piece */
};

static void attend_pieces(void *context, int64_t first, int64_t last) {
    const struct attention_job *job = context;
    const struct attention *a = job->a;
    for (int64_t piece = first; piece < last; piece++) {
        int64_t token = piece / a->key_heads, row = a->row[token];
        graft_attend_one(a, piece % a->key_heads, a->visible[token], a->table + token * a->table_stride,
                         job->q + row * a->query_row, job->keys, job->values, job->out + row * a->heads * a->value_width,
                         job->scratch + piece * graft_attend_scratch(a->block));
    }
}

/* out (rows, heads, value width) = attention of the single tokens named by `a`; keys (positions, key heads, width) and
 * values alike. 1 when there was no memory for a scratch, else 0. */
EXPORT int graft_attend_rows(const struct attention *a, const float *q, const float *keys, const float *values, float *out,
                             int threads) {
    int64_t pieces = a->tokens * a->key_heads, work = 0;
    float *scratch = malloc(sizeof(float) * (size_t)(pieces * graft_attend_scratch(a->block) + 1));
    if (!scratch) return 1;
    for (int64_t i = 0; i < a->tokens; i++) work += a->visible[i] * a->heads * (a->width + a->value_width);
    struct attention_job job = {a, q, keys, values, out, scratch};
    int64_t grain = work > 0 ? VALUES_PER_PIECE * pieces / work : pieces;
    graft_parallel(pieces, grain < 1 ? 1 : grain, threads, attend_pieces, &job);
    free(scratch);
    return 0;
}
