/* Shared by the files of the matmul: `gemm.c` cuts a matmul into pieces and tiles and walks over the operands to
 * pack them, `gemm_avx512.c` and `gemm_avx2.c` turn and copy one panel and multiply one tile. */
#ifndef GRAFT_GEMM_H
#define GRAFT_GEMM_H

#include "kernels.h"

enum { MOST_K = 256, MOST_N = 1024, SPAN = 64, WIDEST = 32, GAP = 16 };
/* SPAN: pieces of N and K begin at multiples of it, where the 64-value blocks of a stored weight begin.
 * GAP: values between two panels of B. Without it they would lie multiples of 4 KB apart, and a row of B that is cut into them
 * would be written to one set of the first cache. */

/* Where in packed B the panel begins that holds column n; panels are `width` columns wide and `count` rows long. */
INLINE int64_t panel_of(int64_t n, int width, int64_t count) { return n / width * (count * width + GAP); }

/* C[i, j] = or, with `add`, += alpha * sum over k < count of A[i, k] B[k, j], for one tile. */
struct tile {
    int64_t count;         /* k */
    const float *a;        /* A[i, k] at a[i * a_row + k * a_column] */
    int64_t a_row, a_column;
    const float *b;        /* B[k, ..] at b + k * b_row */
    int64_t b_row;
    float *c;              /* C[i, ..] at c + i * c_row */
    int64_t c_row;
    uint32_t mask;         /* which of its columns there are */
    float alpha;
    int add;               /* to what C holds */
};

/* What one instruction set brings: tiles of `rows` x `columns`, and panels of A and B packed for them. */
struct gemm_set {
    int rows, columns;
    int64_t most_m; /* rows of A that are packed at once: with MOST_K of k they stay in the second-level cache */
    /* Row k of B, `length` values, into the panels of `columns` that it crosses, each `count` rows long; zeros behind it. */
    void (*cut)(const float *row, int64_t length, int64_t k, int64_t count, float *to);
    /* to[k * columns + i] = from[i * stride + k] for i < here, k < count: a panel of B; zeros behind `here`. */
    void (*turn_columns)(const float *from, int64_t stride, int here, int64_t count, float *to);
    /* The same for a panel of A, `rows` wide. */
    void (*turn_rows)(const float *from, int64_t stride, int here, int64_t count, float *to);
    /* to[k * rows + i] = from[k * stride + i]: a panel of A whose rows are k; zeros behind `here`. */
    void (*copy_rows)(const float *from, int64_t stride, int here, int64_t count, float *to);
    /* B[k0 .. k0 + count, n0 .. n0 + columns] and A[m0 .. m0 + rows, k0 .. k0 + count] into panels of words of two bfloat16
     * values; NULL where there are no instructions for them. */
    void (*narrow_pack_b)(const struct graft_matrix *b, int64_t k0, int64_t count, int64_t n0, int64_t columns, float *to,
                          float *scratch);
    void (*narrow_pack_a)(const struct graft_matrix *a, int64_t m0, int64_t rows, int64_t k0, int64_t count, float *to,
                          float *scratch);
    /* The first `rows` rows and `columns` columns of a tile; `packed`: both sides lie in panels, `narrow`: of words. The tile is
     * the callee's to change. Not by value: its copy would be read in wider pieces than were just written, and such a read waits
     * until all stores before it have reached the cache, C's too (measured: 6 % of a training step). */
    void (*multiply)(struct tile *t, int rows, int columns, int packed, int narrow);
};

const struct gemm_set *graft_gemm_avx2(void);   /* NULL where the processor lacks it */
const struct gemm_set *graft_gemm_avx512(void);

/* Values first .. first + count of row `row` of a stored weight, as float32. */
void graft_gemm_decode(const struct graft_matrix *w, int64_t row, int64_t first, int64_t count, float *to);

#endif
