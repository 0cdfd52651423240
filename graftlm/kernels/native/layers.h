/* A model and a forward pass for `layers.c`. */
#ifndef GRAFT_LAYERS_H
#define GRAFT_LAYERS_H

#include "kernels.h"
#include "rows.h"

struct linear {                 /* y = x W^T + b */
    struct graft_matrix weight; /* (out, in), `row` its inputs */
    const float *bias;          /* (out,), or NULL */
    int64_t out;
    int64_t number; /* its place in every adapter's table of factors */
};

struct layer {
    const float *norm, *norm_again;     /* (width,) */
    const float *query_norm, *key_norm; /* (D,), or NULL */
    struct linear q, k, v, o, gate, up, down;
    float *keys, *values; /* (positions, K, D) */
    double scale, softcap;
    int64_t window;
};

struct stack { /* a model, filled by Python once */
    int64_t layers, width, inner, heads, key_heads, head_width, turned, block;
    double epsilon, offset; /* of all norms */
    int64_t gelu;
    const float *last_norm;     /* (width,) */
    const float *cosine, *sine; /* (positions, turned) */
    const struct layer *layer;
};

struct pass { /* filled by Python, once a step */
    int64_t rows, threads;
    float *x;                   /* (T, width): embeddings, then the states behind the last norm */
    const int64_t *position;    /* (T,) */
    const int64_t *table;       /* (T, table_stride): the blocks of each row's sequence */
    int64_t table_stride;
    int64_t routes;
    const int64_t *ranges;      /* (routes, 2): first row, one past the last */
    const struct factors *const *const *factors; /* (routes,): a table by `number`, NULL where a layer is not adapted */
};

#endif
