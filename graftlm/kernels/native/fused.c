/* The fused operations between a network's matmuls: RMSNorm, gated activations, rotary positions, cross entropy.
 *
 * PyTorch composes each from several operations that read and write memory, and saves most results for backward. Here each
 * reads its inputs and writes its result once, and the backward pass recomputes what is cheap.
 *
 * Every row's result depends on that row alone; a sum over rows (RMSNorm's weight) is taken over blocks of fixed size in
 * their order. So results do not depend on the number of threads.
 */
#include <math.h>

#include "kernels.h"

#ifdef __clang__
#define UNROLLED_4 _Pragma("unroll")
#else
#define UNROLLED_4 _Pragma("GCC unroll 4")
#endif

struct fused_primitives {
    float (*norm)(const void *x, const float *w, float offset, float epsilon, int64_t n, void *y, int type);
    void (*norm_back)(const void *dy, const void *x, const float *w, float offset, float r, int64_t n, void *dx, float *dw,
                      int type);
    void (*gate)(const void *g, const void *u, int64_t n, void *y, int gelu, int type);
    void (*gate_back)(const void *dy, const void *g, const void *u, int64_t n, void *dg, void *du, int gelu, int type);
    void (*rotate)(const void *x, void *y, const float *c, const float *s, int64_t half, int back, int type);
    float (*cross)(void *x, int64_t n, int64_t label, const float *weight, int type);
};

/* ---- four lanes: what every compiler makes something good of, NEON included ---- */

#define NAME(x) plain_##x
#define TARGET
#define LANES 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define LARGER(a, b) plain_larger(a, b)
typedef float four __attribute__((vector_size(16)));
INLINE four plain_larger(four a, four b) {
    typedef int32_t ints __attribute__((vector_size(16)));
    ints above = a > b;
    return (four)(((ints)a & above) | ((ints)b & ~above));
}
#include "fused.inc"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define FMA(a, b, c) ((VEC)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define LARGER(a, b) ((VEC)_mm256_max_ps((__m256)(a), (__m256)(b)))
#include "fused.inc"

#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES 16
#define FMA(a, b, c) ((VEC)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define LARGER(a, b) ((VEC)_mm512_max_ps((__m512)(a), (__m512)(b)))
#include "fused.inc"

static const struct fused_primitives *const sets[] = {&plain_fused, &avx2_fused, &avx512_fused};
#else
static const struct fused_primitives *const sets[] = {&plain_fused, &plain_fused, &plain_fused};
#endif

static const struct fused_primitives *fused = &plain_fused;

void graft_fused_choose(int choice) { fused = sets[choice]; }

void graft_norm_row(const float *x, const float *w, float offset, float epsilon, int64_t n, float *y) {
    fused->norm(x, w, offset, epsilon, n, y, FLOAT32);
}

void graft_gate_row(const float *g, const float *u, int64_t n, float *y, int gelu) { fused->gate(g, u, n, y, gelu, FLOAT32); }

void graft_rotate_head(float *x, const float *cosine, const float *sine, int64_t turned) {
    fused->rotate(x, x, cosine, sine, turned / 2, 0, FLOAT32);
}

enum { VALUES_PER_PIECE = 1 << 14, ROWS_PER_BLOCK = 64, COLUMNS_PER_PIECE = 512 };
/* VALUES_PER_PIECE: values that a thread takes at once. ROWS_PER_BLOCK: rows whose share of RMSNorm's weight gradient is
 * summed first; Python has it too. */

static int64_t grain_of(int64_t n) { return n >= VALUES_PER_PIECE ? 1 : VALUES_PER_PIECE / (n > 0 ? n : 1); }

/* ---- RMSNorm ---- */

struct norm_job {
    const char *x, *dy;
    const float *w;
    float offset, epsilon;
    int64_t rows, n;
    char *y;
    float *r, *partial, *dw;
    int type;
};

static void norm_rows(void *context, int64_t first, int64_t last) {
    const struct norm_job *job = context;
    int64_t bytes = job->n * float_bytes(job->type);
    for (int64_t row = first; row < last; row++)
        job->r[row] = fused->norm(job->x + row * bytes, job->w, job->offset, job->epsilon, job->n, job->y + row * bytes,
                                  job->type);
}

/* y (rows, n) = x r (w + offset), r (rows,) = 1 / sqrt(mean(x^2) + epsilon); x and y of `type` (32 bits or bfloat16). */
EXPORT void graft_norm(const void *x, const float *w, float offset, float epsilon, int64_t rows, int64_t n, void *y,
                       float *r, int type, int threads) {
    struct norm_job job = {.x = x, .w = w, .offset = offset, .epsilon = epsilon, .rows = rows, .n = n, .y = y, .r = r,
                           .type = type};
    graft_parallel(rows, grain_of(n), threads, norm_rows, &job);
}

static void norm_back_rows(void *context, int64_t first, int64_t last) {
    const struct norm_job *job = context;
    int64_t bytes = job->n * float_bytes(job->type);
    for (int64_t row = first; row < last; row++)
        fused->norm_back(job->dy + row * bytes, job->x + row * bytes, job->w, job->offset, job->r[row], job->n,
                         job->y + row * bytes, NULL, job->type);
}

static void norm_back_blocks(void *context, int64_t first, int64_t last) {
    const struct norm_job *job = context;
    int64_t bytes = job->n * float_bytes(job->type);
    for (int64_t block = first; block < last; block++) {
        float *sum = job->partial + block * job->n;
        int64_t begin = block * ROWS_PER_BLOCK, end = begin + ROWS_PER_BLOCK < job->rows ? begin + ROWS_PER_BLOCK : job->rows;
        memset(sum, 0, sizeof(float) * (size_t)job->n);
        for (int64_t row = begin; row < end; row++)
            fused->norm_back(job->dy + row * bytes, job->x + row * bytes, job->w, job->offset, job->r[row], job->n,
                             job->y + row * bytes, sum, job->type);
    }
}

static void norm_sum_columns(void *context, int64_t first, int64_t last) {
    const struct norm_job *job = context;
    int64_t blocks = (job->rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
    for (int64_t i = first; i < last; i++) job->dw[i] = 0;
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = first; i < last; i++) job->dw[i] += job->partial[block * job->n + i];
}

/* dx (rows, n), and dw (n,) where it is given; `partial` (blocks of rows, n) is then a scratch. */
EXPORT void graft_norm_back(const void *dy, const void *x, const float *w, float offset, float *r, int64_t rows, int64_t n,
                            void *dx, float *dw, float *partial, int type, int threads) {
    struct norm_job job = {.x = x, .dy = dy, .w = w, .offset = offset, .rows = rows, .n = n, .y = dx, .r = r,
                           .partial = partial, .dw = dw, .type = type};
    if (!dw) {
        graft_parallel(rows, grain_of(n), threads, norm_back_rows, &job);
        return;
    }
    graft_parallel((rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK, 1, threads, norm_back_blocks, &job);
    graft_parallel(n, COLUMNS_PER_PIECE, threads, norm_sum_columns, &job);
}

/* ---- gated activations ---- */

struct gate_job {
    const char *g, *u, *dy;
    char *y, *dg, *du;
    int64_t n, in_row, out_row; /* values from one row of g and u to the next, and of y or of dg and du */
    int gelu, type;
};

static void gate_rows(void *context, int64_t first, int64_t last) {
    const struct gate_job *job = context;
    int64_t size = float_bytes(job->type), in = job->in_row * size, out = job->out_row * size;
    for (int64_t row = first; row < last; row++)
        fused->gate(job->g + row * in, job->u + row * in, job->n, job->y + row * out, job->gelu, job->type);
}

/* y (rows, n) = g s(g) u, or with `gelu` its tanh form; rows of g and of u are `row` values apart. */
EXPORT void graft_gate(const void *g, const void *u, int64_t row, int64_t rows, int64_t n, void *y, int gelu, int type,
                       int threads) {
    struct gate_job job = {.g = g, .u = u, .y = y, .n = n, .in_row = row, .out_row = n, .gelu = gelu, .type = type};
    graft_parallel(rows, grain_of(n), threads, gate_rows, &job);
}

static void gate_back_rows(void *context, int64_t first, int64_t last) {
    const struct gate_job *job = context;
    int64_t size = float_bytes(job->type), in = job->in_row * size, out = job->out_row * size;
    for (int64_t row = first; row < last; row++)
        fused->gate_back(job->dy + row * job->n * size, job->g + row * in, job->u + row * in, job->n, job->dg + row * out,
                         job->du + row * out, job->gelu, job->type);
}

/* dg and du (rows, n), their rows `out_row` values apart. */
EXPORT void graft_gate_back(const void *dy, const void *g, const void *u, int64_t row, int64_t rows, int64_t n, void *dg,
                            void *du, int64_t out_row, int gelu, int type, int threads) {
    struct gate_job job = {.g = g, .u = u, .dy = dy, .dg = dg, .du = du, .n = n, .in_row = row, .out_row = out_row,
                           .gelu = gelu, .type = type};
    graft_parallel(rows, grain_of(n), threads, gate_back_rows, &job);
}

/* ---- rotary positions ---- */

struct rotary {                /* 64 bytes, filled by Python: x (tokens, heads, d) -> y, in values */
    const char *x;
    char *y;
    int64_t heads, x_token, x_head, y_token, y_head, unused;
};

struct rotary_job {
    const struct rotary *parts;
    int64_t count, d, turned, period;
    const float *cosine, *sine; /* (period, turned) */
    int back, type;
};

static void rotate_tokens(void *context, int64_t first, int64_t last) {
    const struct rotary_job *job = context;
    int64_t size = float_bytes(job->type);
    for (int64_t token = first; token < last; token++) {
        const float *c = job->cosine + token % job->period * job->turned, *s = job->sine + token % job->period * job->turned;
        for (const struct rotary *part = job->parts; part < job->parts + job->count; part++)
            for (int64_t head = 0; head < part->heads; head++) {
                const char *x = part->x + (token * part->x_token + head * part->x_head) * size;
                char *y = part->y + (token * part->y_token + head * part->y_head) * size;
                fused->rotate(x, y, c, s, job->turned / 2, job->back, job->type);
                memcpy(y + job->turned * size, x + job->turned * size, (size_t)((job->d - job->turned) * size));
            }
    }
}

/* The first `turned` values of every head are turned by their token's angles, or with `back` the gradient turned back; the
 * rest is copied. Token t uses row t % period of the cosines and sines. */
EXPORT void graft_rotary(const struct rotary *parts, int64_t count, int64_t tokens, int64_t d, int64_t turned,
                         const float *cosine, const float *sine, int64_t period, int back, int type, int threads) {
    struct rotary_job job = {parts, count, d, turned, period, cosine, sine, back, type};
    int64_t values = 0;
    for (int64_t i = 0; i < count; i++) values += parts[i].heads * d;
    graft_parallel(tokens, grain_of(values), threads, rotate_tokens, &job);
}

/* ---- cross entropy ---- */

struct cross_job {
    char *logits;
    int64_t n;
    const int64_t *labels;
    const float *weights;
    float *losses;
    int type;
};

static void cross_rows(void *context, int64_t first, int64_t last) {
    const struct cross_job *job = context;
    for (int64_t row = first; row < last; row++)
        job->losses[row] = fused->cross(job->logits + row * job->n * float_bytes(job->type), job->n, job->labels[row],
                                        job->weights ? job->weights + row : NULL, job->type);
}

/* losses (rows,) of logits (rows, n); with `weights`, logits become weight * (softmax - onehot). Returns 1, and touches
 * nothing, when a label is not in 0 .. n - 1. */
EXPORT int graft_cross_entropy(void *logits, int64_t rows, int64_t n, const int64_t *labels, const float *weights,
                               float *losses, int type, int threads) {
    for (int64_t row = 0; row < rows; row++)
        if (labels[row] < 0 || labels[row] >= n) return 1;
    struct cross_job job = {logits, n, labels, weights, losses, type};
    graft_parallel(rows, grain_of(n), threads, cross_rows, &job);
    return 0;
}
