/* Shared by `rows.c` and `layers.c`: the primitives of decoding, an adapter's factors, attention over blocks. */
#ifndef GRAFT_ROWS_H
#define GRAFT_ROWS_H

#include "kernels.h"

struct row_primitives { /* see rows.inc */
    void (*dots)(const void *w, int64_t w_stride, int type, int64_t n, int outs, const float *x, int64_t stride, int rows,
                 float *sums);
    void (*spread)(const void *B, int type, int64_t r, int64_t n, const float *h, int rows, float *y, int64_t y_stride);
    float (*exps)(float *values, int64_t n, float most);
    void (*mix)(float *out, float keep, const float *p, int64_t count, const float *v, int64_t stride, int64_t n);
    /* of GGUF files, see blocks.inc; `w_row` in bytes, `count` in blocks */
    void (*block_values)(const uint8_t *blocks, int kind, int64_t count, float *to);
    void (*block_dots)(const uint8_t *w, int64_t w_row, int kind, int64_t count, int outs, const float *x, float *sums);
    void (*round)(const float *from, int64_t n, void *to, int type);
};
extern const struct row_primitives *use_rows; /* of the instruction set that was chosen */

struct factors { /* an adapter on one layer, filled by Python once */
    const void *A, *B; /* (r, in), (r, out) */
    int64_t rank;
    double scale;
    int64_t a_type, b_type;
};

struct attention { /* filled by Python, once a step */
    int64_t tokens;         /* n: new tokens to answer */
    const int64_t *row;     /* (n,): which row of q and of out */
    const int64_t *visible; /* (n,): tokens before and with the new one */
    const int64_t *table;   /* (n, table_stride): blocks of each token's sequence */
    int64_t table_stride, block;
    int64_t heads, key_heads, width, value_width;
    int64_t query_row, query_head; /* distance between rows and between heads of q */
    double scale, softcap;         /* softcap 0: none */
    int64_t window;                /* 0: none */
};

int64_t graft_attend_scratch(int64_t block); /* floats that `graft_attend_one` wants */

/* The queries of one key head of one token, which sees `visible` tokens in the blocks of `table`: queries (heads, width),
 * `query_head` apart, outs (heads, value width). Of `a` it reads no field that has an entry for each token. */
void graft_attend_one(const struct attention *a, int64_t head, int64_t visible, const int64_t *table, const float *queries,
                      const float *keys, const float *values, float *outs, float *scratch);

#endif
