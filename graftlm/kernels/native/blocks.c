/* Weights in the blocks of GGUF files: ranges of values made dense, and products with a few rows.
 *
 * For one row of x the blocks are decoded in registers (`blocks.inc`). For more, a piece of a few rows of W is made dense in the
 * first-level cache and meets all rows of x there. Both sum the same values in the same order, so a row's result is the same
 * bits whoever shares its batch.
 *
 * A row of W is whole blocks, its bytes end to end with those of the next row.
 */
#include "kernels.h"
#include "rows.h"

enum { TOGETHER = 8, COLUMNS = 512, ROWS = 64, VALUES_PER_PIECE = 1 << 15 };
/* TOGETHER: rows of W, and COLUMNS: of its columns, that are dense at once. ROWS: of x, that meet them. */

static const uint8_t *block_at(const struct graft_matrix *w, int64_t row, int64_t column) {
    return (const uint8_t *)w->values + (w->start + row * w->row + column) / graft_block_length(w->kind) * graft_block_bytes(w->kind);
}

void graft_block_range(const struct graft_matrix *w, int64_t row, int64_t first, int64_t count, float *to) {
    const int64_t length = graft_block_length(w->kind);
    float whole[256];
    while (count > 0) {
        const int64_t skip = first % length;
        int64_t here = count / length * length;
        if (skip || !here) { /* a part of a block */
            here = length - skip < count ? length - skip : count;
            use_rows->block_values(block_at(w, row, first - skip), w->kind, 1, whole);
            memcpy(to, whole + skip, sizeof(float) * (size_t)here);
        } else {
            use_rows->block_values(block_at(w, row, first), w->kind, here / length, to);
        }
        first += here, count -= here, to += here;
    }
}

static void outputs(const struct graft_matrix *w, int64_t first, int outs, const float *x, int64_t stride, int rows, float *y,
                    int64_t y_row) {
    const int64_t w_row = w->row / graft_block_length(w->kind) * graft_block_bytes(w->kind);
    float sums[ROWS / MAX_ROWS][TOGETHER * MAX_ROWS], dense[TOGETHER * COLUMNS];
    memset(sums, 0, sizeof sums[0] * (size_t)((rows + MAX_ROWS - 1) / MAX_ROWS));
    for (int64_t column = 0; column < w->row; column += COLUMNS) {
        const int64_t n = w->row - column < COLUMNS ? w->row - column : COLUMNS, count = n / graft_block_length(w->kind);
        if (rows == 1) {
            use_rows->block_dots(block_at(w, first, column), w_row, w->kind, count, outs, x + column, sums[0]);
            continue;
        }
        for (int o = 0; o < outs; o++)
            use_rows->block_values(block_at(w, first + o, column), w->kind, count, dense + o * n);
        for (int k = 0; k < rows; k += MAX_ROWS)
            use_rows->dots(dense, n, FLOAT32, n, outs, x + k * stride + column, stride, rows - k < MAX_ROWS ? rows - k : MAX_ROWS,
                           sums[k / MAX_ROWS]);
    }
    for (int k = 0; k < rows; k++)
        for (int o = 0; o < outs; o++) y[k * y_row + first + o] = sums[k / MAX_ROWS][o * MAX_ROWS + k % MAX_ROWS];
}

void graft_block_outputs(const struct graft_matrix *w, int64_t first, int64_t last, const float *x, int64_t stride, int64_t rows,
                         float *y, int64_t y_row) {
    for (int64_t k = 0; k < rows; k += ROWS)
        for (int64_t o = first; o < last; o += TOGETHER)
            outputs(w, o, (int)(last - o < TOGETHER ? last - o : TOGETHER), x + k * stride, stride,
                    (int)(rows - k < ROWS ? rows - k : ROWS), y + k * y_row, y_row);
}

/* ---- the exported operations ---- */

struct block_job {
    struct graft_matrix w;
    int64_t first, columns; /* of each row, made dense */
    char *dense;            /* (rows, columns) */
    int type;
    const float *x; /* (rows, in), rows `stride` apart */
    int64_t stride, rows, out;
    float *y; /* (rows, out) */
};

static void dense_rows(void *context, int64_t first_row, int64_t last_row) {
    const struct block_job *job = context;
    const int64_t bytes = float_bytes(job->type);
    for (int64_t row = first_row; row < last_row; row++)
        for (int64_t i = 0; i < job->columns; i += COLUMNS) {
            float values[COLUMNS];
            const int64_t n = job->columns - i < COLUMNS ? job->columns - i : COLUMNS;
            char *to = job->dense + (row * job->columns + i) * bytes;
            graft_block_range(&job->w, row, job->first + i, n, job->type == FLOAT32 ? (float *)to : values);
            if (job->type != FLOAT32) use_rows->round(values, n, to, job->type);
        }
}

static int64_t grain_of(int64_t values) { return values >= VALUES_PER_PIECE ? 1 : VALUES_PER_PIECE / (values > 0 ? values : 1); }

/* dense (rows, columns) = columns first .. first + columns of each row of `in` values. */
EXPORT void graft_blocks_dequantize(const void *blocks, int kind, int64_t rows, int64_t in, int64_t first, int64_t columns,
                                    void *dense, int type, int threads) {
    struct block_job job = {.w = {.row = in, .values = blocks, .kind = kind}, .first = first, .columns = columns, .dense = dense,
                            .type = type};
    graft_parallel(rows, grain_of(columns), threads, dense_rows, &job);
}

static void output_rows(void *context, int64_t first, int64_t last) {
    const struct block_job *job = context;
    graft_block_outputs(&job->w, first, last, job->x, job->stride, job->rows, job->y, job->out);
}

/* y (rows, out) = x W^T, all float32; rows of x (rows, in) lie `stride` apart. */
EXPORT void graft_blocks_matvec(const void *blocks, int kind, int64_t out, int64_t in, const float *x, int64_t stride,
                                int64_t rows, float *y, int threads) {
    struct block_job job = {.w = {.row = in, .values = blocks, .kind = kind}, .x = x, .stride = stride, .rows = rows, .out = out,
                            .y = y};
    const int64_t grain = (grain_of(in) + TOGETHER - 1) / TOGETHER * TOGETHER;
    graft_parallel(out, grain, threads, output_rows, &job);
}
