/* The exported operations. Each cuts its work into pieces, hands whole blocks to the primitives of the instruction set
 * that was chosen, and does part blocks at either end itself.
 *
 * A stored NF4 weight: value i has the high (i even) or low half of packed[i / 2] as its code, block b = i / 64 the scale
 * dynamic[absmax[b]] * group_scale[b / 256] + offset. A weight may start anywhere in the packed values (`start`), which
 * is how slices of a stack of experts work without a copy.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* madvise */
#endif
#include <stdlib.h>

#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

enum { PIECE = 96, ROWS_TOGETHER = 32, VALUES_PER_PIECE = 1 << 15 };
/* PIECE: blocks whose scales are decoded at once. ROWS_TOGETHER: rows of W that share a part of x while it is in the
 * first-level cache. VALUES_PER_PIECE: values of W that a thread takes at once. */

struct tables tables;
static const struct primitives *use = &graft_scalar;

void graft_borrow_openmp(void *gomp_parallel);

/* Raised whenever an exported function changes: Python refuses a library that was compiled from other sources. */
EXPORT int graft_version(void) { return 3; }

EXPORT void graft_openmp(void *gomp_parallel) { graft_borrow_openmp(gomp_parallel); }

/* Asks for large pages in [address, address + bytes), memory nobody has written to yet: 32 faults instead of 16384. */
EXPORT void graft_huge_pages(void *address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)address + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)address + (uintptr_t)bytes) / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* refused: pages stay small */
#else
    (void)address, (void)bytes;
#endif
}

/* The primitives numbered `choice` (0 plain C, then from plain to wide), or NULL when this machine has none so wide. */
static const struct primitives *numbered(int choice) {
    if (choice == 0) return &graft_scalar;
    if (graft_neon()) return choice == 1 ? graft_neon() : NULL;
    return choice <= 2 ? graft_x86(choice - 1) : NULL;
}

/* The name of set `choice`, or NULL where this machine lacks it. */
EXPORT const char *graft_name(int choice) {
    const struct primitives *found = numbered(choice);
    return found ? found->name : NULL;
}

/* Copies the reference's tables and chooses the widest instruction set, or set `choice` when that is not negative. */
EXPORT int graft_init(const float *nf4, const float *midpoints, const float *dynamic, const uint8_t *bins, int choice) {
    memcpy(tables.nf4, nf4, sizeof tables.nf4);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 4; k++) tables.nf4_bytes[k][i] = (uint8_t)(bits_of(nf4[i]) >> 8 * k);
    memcpy(tables.midpoints, midpoints, sizeof tables.midpoints);
    memcpy(tables.dynamic, dynamic, sizeof tables.dynamic);
    memcpy(tables.bins, bins, sizeof tables.bins);
    int last = choice < 0 ? 2 : choice;
    for (; last > 0 && !numbered(last);) last--;
    use = numbered(last);
    graft_rows_choose(last);
    graft_fused_choose(last);
    graft_attention_choose(last);
    return last;
}

/* How many rows of `in` values of the weight a thread takes at once. */
static int64_t row_grain(int64_t in) { return in >= VALUES_PER_PIECE ? 1 : VALUES_PER_PIECE / (in > 0 ? in : 1); }

/* ---- NF4 ---- */

struct nf4 {
    const uint8_t *packed, *absmax;
    const float *group_scale;
    float offset;
};

/* The float32 scales of blocks first .. first + count. */
static void decode_scales(const struct nf4 *w, int64_t first, int64_t count, float *scales) {
    while (count > 0) {
        int64_t here = GROUP - first % GROUP;
        if (here > count) here = count;
        use->absmax_decode(w->absmax + first, w->group_scale[first / GROUP], w->offset, here, scales);
        first += here, scales += here, count -= here;
    }
}

static float scale_of(const struct nf4 *w, int64_t value) {
    float scale;
    decode_scales(w, value / BLOCK, 1, &scale);
    return scale;
}

static void dequantize_part(const struct nf4 *w, int64_t first, int64_t last, void *out, int type) {
    if (first >= last) return;
    float scale = scale_of(w, first);
    for (int64_t i = first; i < last; i++) store_float(out, type, i - first, tables.nf4[nf4_code(w->packed, i)] * scale);
}

/* Where the whole blocks of first .. last begin and end; both lie within it, also when it holds no whole block. */
static void whole_blocks(int64_t first, int64_t last, int64_t *begin, int64_t *end) {
    *begin = (first + BLOCK - 1) / BLOCK * BLOCK;
    if (*begin > last) *begin = last;
    *end = last / BLOCK * BLOCK;
    if (*end < *begin) *end = *begin;
}

struct dequantize_job {
    struct nf4 w;
    int64_t start, in; /* first value, values in a row */
    int64_t columns;   /* values wanted of each row, from its first on */
    char *out;         /* (rows, columns) */
    int type, stream;
};

/* Values first .. last of the packed ones to `out`. */
static void dequantize_range(const struct nf4 *w, int64_t first, int64_t last, char *out, int type, int stream) {
    float scales[PIECE];
    int64_t begin, end, bytes = float_bytes(type);
    whole_blocks(first, last, &begin, &end);
    dequantize_part(w, first, begin, out, type);
    for (int64_t b = begin / BLOCK; b < end / BLOCK; b += PIECE) {
        int64_t count = end / BLOCK - b < PIECE ? end / BLOCK - b : PIECE;
        decode_scales(w, b, count, scales);
        use->nf4_dequantize(w->packed + b * BLOCK_BYTES, scales, count, out + (b * BLOCK - first) * bytes, type, stream);
    }
    dequantize_part(w, end, last, out + (end - first) * bytes, type);
}

void graft_nf4_range(const uint8_t *packed, const uint8_t *absmax, const float *group_scale, float offset, int64_t first,
                     int64_t last, float *to) {
    struct nf4 w = {packed, absmax, group_scale, offset};
    dequantize_range(&w, first, last, (char *)to, FLOAT32, 0);
}

void graft_int8_range(const int8_t *values, float scale, int64_t count, float *to) {
    use->int8_dequantize(values, scale, count, to, FLOAT32, 0);
}

static void dequantize_rows(void *context, int64_t first, int64_t last) {
    const struct dequantize_job *job = context;
    for (int64_t o = first; o < last; o++) {
        int64_t from = job->start + o * job->in;
        char *to = job->out + o * job->columns * float_bytes(job->type);
        dequantize_range(&job->w, from, from + job->columns, to, job->type, job->stream);
    }
}

static void dequantize_pieces(void *context, int64_t first, int64_t last) {
    const struct dequantize_job *job = context;
    char *to = job->out + first * float_bytes(job->type);
    dequantize_range(&job->w, job->start + first, job->start + last, to, job->type, job->stream);
}

/* out (rows, columns) = the first `columns` values of each of `rows` rows of `in` values; row 0 begins at `start`.
 * `stream`: `out` is too large to be found in a cache later, so write past them. */
EXPORT void graft_nf4_dequantize(const uint8_t *packed, const uint8_t *absmax, const float *group_scale,
                                 const float *offset, int64_t start, int64_t rows, int64_t in, int64_t columns,
                                 void *out, int type, int stream, int threads) {
    struct dequantize_job job = {{packed, absmax, group_scale, *offset}, start, in, columns, out, type, stream};
    if (columns == in) /* one long range, whatever its rows are */
        graft_parallel(rows * in, VALUES_PER_PIECE, threads, dequantize_pieces, &job);
    else
        graft_parallel(rows, row_grain(columns), threads, dequantize_rows, &job);
}

struct quantize_job {
    const char *in;
    int type;
    uint8_t *packed;
    float *absmax;
};

static void quantize_blocks(void *context, int64_t first, int64_t last) {
    const struct quantize_job *job = context;
    use->nf4_quantize(job->in + first * BLOCK * float_bytes(job->type), job->type, last - first,
                      job->packed + first * BLOCK_BYTES, job->absmax + first);
}

/* The first quantization: packed codes and the float32 absmax of each block of in[0 .. n]. */
EXPORT void graft_nf4_quantize(const void *in, int type, int64_t n, uint8_t *packed, float *absmax, int threads) {
    struct quantize_job job = {in, type, packed, absmax};
    int64_t whole = n / BLOCK;
    graft_parallel(whole, VALUES_PER_PIECE / BLOCK, threads, quantize_blocks, &job);
    if (whole * BLOCK == n) return;
    uint32_t largest = 0;
    for (int64_t i = whole * BLOCK; i < n; i++) largest = larger_magnitude(largest, load_float(in, type, i));
    float scale = float_of(largest);
    if (scale < 1e-38f) scale = 1e-38f;
    absmax[whole] = scale;
    for (int64_t i = whole * BLOCK; i < n; i += 2) { /* an odd end is filled up with a zero */
        int high = nf4_nearest(load_float(in, type, i) / scale);
        int low = nf4_nearest(i + 1 < n ? load_float(in, type, i + 1) / scale : 0.0f);
        packed[i / 2] = (uint8_t)(high << 4 | low);
    }
}

struct absmax_job {
    const float *absmax;
    float offset;
    int64_t blocks;
    uint8_t *codes;
    float *scale;
};

static void absmax_groups(void *context, int64_t first, int64_t last) {
    const struct absmax_job *job = context;
    for (int64_t g = first; g < last; g++) {
        int64_t begin = g * GROUP, end = begin + GROUP < job->blocks ? begin + GROUP : job->blocks;
        float scale = 0;
        for (int64_t i = begin; i < end; i++) {
            float size = float_of(bits_of(job->absmax[i] - job->offset) & 0x7fffffff);
            if (size > scale) scale = size;
        }
        job->scale[g] = scale;
        float inverse = 1.0f / scale;
        for (int64_t i = begin; i < end; i++) {
            float value = (job->absmax[i] - job->offset) * inverse;
            value = value < -1 ? -1 : value > 1 ? 1 : value;
            double place = (double)((value + 1) * 0.5f) * 65535 + 0.5; /* rounded to float32 once, below */
            float bin = (float)place;
            job->codes[i] = scale == 0 ? 0 : tables.bins[bin >= 0 && bin < 65536 ? (int)bin : 0];
        }
    }
}

/* The second quantization; `offset` is the mean of absmax, taken by the caller as the reference takes it. */
EXPORT void graft_absmax_quantize(const float *absmax, int64_t blocks, const float *offset, uint8_t *codes, float *scale,
                                  int threads) {
    struct absmax_job job = {absmax, *offset, blocks, codes, scale};
    graft_parallel((blocks + GROUP - 1) / GROUP, 16, threads, absmax_groups, &job);
}

struct matvec_job {
    struct nf4 w;
    int64_t start, in, out;
    int rows;             /* of x, at most MAX_ROWS */
    int64_t stride;
    const float *x;       /* (rows, in), rows `stride` apart */
    int64_t half;         /* distance between rows of even or of odd, at least in / 2 + 1 */
    const float *even;    /* (rows, half): x[0], x[2], .. */
    const float *odd;     /* (rows, half): x[1], x[3], .. */
    float *y;             /* (rows, out) */
};

static void dot_part(const struct matvec_job *job, int64_t row_start, int64_t first, int64_t last, float *sums) {
    if (first >= last) return;
    float scale = scale_of(&job->w, first);
    for (int64_t i = first; i < last; i++) {
        float value = tables.nf4[nf4_code(job->w.packed, i)] * scale;
        for (int k = 0; k < job->rows; k++) sums[k] += value * job->x[k * job->stride + i - row_start];
    }
}

static void dot_rows(void *context, int64_t first_row, int64_t last_row) {
    enum { SCALES = 2048 };
    const struct matvec_job *job = context;
    const int64_t most = PIECE / job->rows, all = (job->in + BLOCK - 1) / BLOCK; /* 24 KiB of x */
    const int64_t piece = (all + (all + most - 1) / most - 1) / ((all + most - 1) / most); /* equal parts */
    const int together = job->in % BLOCK == 0 && job->start % BLOCK == 0 && ROWS_TOGETHER * all <= SCALES;
    float scales[SCALES];
    for (int64_t tile = first_row; tile < last_row; tile += ROWS_TOGETHER) {
        int64_t tile_end = tile + ROWS_TOGETHER < last_row ? tile + ROWS_TOGETHER : last_row;
        float sums[ROWS_TOGETHER][MAX_ROWS] = {{0}};
        if (together) decode_scales(&job->w, job->start / BLOCK + tile * all, (tile_end - tile) * all, scales);
        for (int64_t part = 0; part * BLOCK < job->in; part += piece)
            for (int64_t o = tile; o < tile_end; o++) {
                int64_t first = job->start + o * job->in, begin, end;
                whole_blocks(first, first + job->in, &begin, &end);
                int64_t b = begin / BLOCK + part, count = end / BLOCK - b;
                if (count <= 0) continue;
                if (count > piece) count = piece;
                int64_t i = b * BLOCK - first; /* the part's first value within this row */
                const float *high = i & 1 ? job->odd + i / 2 : job->even + i / 2;
                const float *low = i & 1 ? job->even + i / 2 + 1 : job->odd + i / 2;
                const float *of_part = scales + (o - tile) * all + part;
                if (!together) decode_scales(&job->w, b, count, scales), of_part = scales;
                use->nf4_dot(job->w.packed + b * BLOCK_BYTES, of_part, count, high, low, job->half, job->rows, sums[o - tile]);
            }
        for (int64_t o = tile; o < tile_end; o++) {
            int64_t first = job->start + o * job->in, last = first + job->in, begin, end;
            whole_blocks(first, last, &begin, &end);
            dot_part(job, first, first, begin, sums[o - tile]);
            dot_part(job, first, end, last, sums[o - tile]);
            for (int k = 0; k < job->rows; k++) job->y[k * job->out + o] = sums[o - tile][k];
        }
    }
}

void graft_nf4_outputs(const struct graft_matrix *w, int64_t first, int64_t last, const float *x, int64_t stride, int rows,
                       const float *even, const float *odd, int64_t half, float *y, int64_t y_row) {
    struct matvec_job job = {{w->values, w->absmax, w->scale, *w->offset}, w->start, w->row, y_row, rows, stride, x, half, even,
                             odd, y};
    dot_rows(&job, first, last);
}

/* y (rows, out) = x W^T, all float32; rows of x (rows, in) lie `stride` apart. 1 when there was no memory for a copy of x, else 0. */
EXPORT int graft_nf4_matvec(const uint8_t *packed, const uint8_t *absmax, const float *group_scale, const float *offset,
                            int64_t start, int64_t out, int64_t in, const float *x, int64_t stride, int64_t rows, float *y,
                            int threads) {
    int64_t half = graft_half(in);
    int most = rows < MAX_ROWS ? (int)rows : MAX_ROWS;
    float *split = malloc(sizeof(float) * 2 * (size_t)half * (size_t)most);
    if (!split) return 1;
    for (int64_t k = 0; k < rows; k += MAX_ROWS) {
        int here = rows - k < MAX_ROWS ? (int)(rows - k) : MAX_ROWS;
        float *even = split, *odd = split + half * here;
        for (int r = 0; r < here; r++) {
            const float *from = x + (k + r) * stride;
            for (int64_t j = 0; j < in / 2; j++) {
                even[r * half + j] = from[2 * j];
                odd[r * half + j] = from[2 * j + 1];
            }
            if (in % 2) even[r * half + in / 2] = from[in - 1];
        }
        struct matvec_job job = {{packed, absmax, group_scale, *offset}, start, in, out, here, stride, x + k * stride, half, even,
                                 odd, y + k * out};
        graft_parallel(out, row_grain(in), threads, dot_rows, &job);
    }
    free(split);
    return 0;
}

/* ---- int8 ---- */

struct int8_job {
    const int8_t *values; /* (out, in) */
    const float *scale;   /* (out,) */
    int64_t in, out, columns;
    char *dense; /* (out, columns) */
    int type, stream, rows;
    int64_t stride;
    const float *x; /* (rows, in), rows `stride` apart */
    float *y;       /* (rows, out) */
};

static void int8_dense_rows(void *context, int64_t first, int64_t last) {
    const struct int8_job *job = context;
    for (int64_t o = first; o < last; o++)
        use->int8_dequantize(job->values + o * job->in, job->scale[o], job->columns,
                             job->dense + o * job->columns * float_bytes(job->type), job->type, job->stream);
}

/* dense (rows, columns) = the first `columns` values of each of `rows` rows of `in` values. */
EXPORT void graft_int8_dequantize(const int8_t *values, const float *scale, int64_t rows, int64_t in, int64_t columns,
                                  void *dense, int type, int stream, int threads) {
    struct int8_job job = {values, scale, in, rows, columns, dense, type, stream, 0, 0, NULL, NULL};
    graft_parallel(rows, row_grain(columns), threads, int8_dense_rows, &job);
}

static void int8_dot_rows(void *context, int64_t first_row, int64_t last_row) {
    const struct int8_job *job = context;
    const int64_t piece = PIECE * BLOCK / job->rows;
    for (int64_t tile = first_row; tile < last_row; tile += ROWS_TOGETHER) {
        int64_t tile_end = tile + ROWS_TOGETHER < last_row ? tile + ROWS_TOGETHER : last_row;
        float sums[ROWS_TOGETHER][MAX_ROWS] = {{0}};
        for (int64_t i = 0; i < job->in; i += piece) {
            int64_t count = job->in - i < piece ? job->in - i : piece;
            for (int64_t o = tile; o < tile_end; o++)
                use->int8_dot(job->values + o * job->in + i, count, job->x + i, job->stride, job->rows, sums[o - tile]);
        }
        for (int64_t o = tile; o < tile_end; o++)
            for (int k = 0; k < job->rows; k++) job->y[k * job->out + o] = sums[o - tile][k] * job->scale[o];
    }
}

/* y (rows, out) = x W^T, all float32; rows of x (rows, in) lie `stride` apart. */
EXPORT void graft_int8_matvec(const int8_t *values, const float *scale, int64_t out, int64_t in, const float *x,
                              int64_t stride, int64_t rows, float *y, int threads) {
    for (int64_t k = 0; k < rows; k += MAX_ROWS) {
        int here = rows - k < MAX_ROWS ? (int)(rows - k) : MAX_ROWS;
        struct int8_job job = {values, scale, in, out, in, NULL, FLOAT32, 0, here, stride, x + k * stride, y + k * out};
        graft_parallel(out, row_grain(in), threads, int8_dot_rows, &job);
    }
}
