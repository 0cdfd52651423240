/* Shared by the files of this folder: float types, the tables, and the list of primitives that each instruction set
 * implements. `kernels.c` exports the operations and does everything that is the same everywhere (threads, part blocks,
 * alignment, undoing the second quantization); a primitive only ever sees whole blocks of 64 values.
 *
 * Results of quantize and dequantize are the reference's bit for bit: build with -ffp-contract=off, so that no compiler
 * fuses a multiplication with an addition where the reference rounds twice. Matmuls with x use fused operations on purpose.
 */
#ifndef GRAFT_KERNELS_H
#define GRAFT_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64       /* values that share one absmax */
#define BLOCK_BYTES 32 /* their packed 4-bit codes */
#define GROUP 256      /* absmax codes that share one scale */
#define MAX_ROWS 8     /* rows of x for each read of the weight */

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

enum float_type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct tables {
    float nf4[16];
    float midpoints[15];
    float dynamic[256];
    uint8_t bins[65536];
    uint8_t nf4_bytes[4][16]; /* byte k of value i of nf4 */
};
extern struct tables tables; /* filled once by graft_init from the reference's own constants */

/* Every pointer may have any alignment. `scales` has one float32 absmax for each block. */
struct primitives {
    const char *name;
    /* out[0 .. 64 * blocks] = codes * scales, rounded to `type`; `stream`: past the caches, where `out` is aligned */
    void (*nf4_dequantize)(const uint8_t *packed, const float *scales, int64_t blocks, void *out, int type, int stream);
    /* in[0 .. 64 * blocks] of `type` -> packed codes and absmax of each block */
    void (*nf4_quantize)(const void *in, int type, int64_t blocks, uint8_t *packed, float *absmax);
    /* sums[k] += dot(weights, x_k) for k < rows <= MAX_ROWS. x_k comes split: value 2j of the blocks (the high half of
     * byte j) meets high[k * stride + j], value 2j + 1 meets low[k * stride + j]. */
    void (*nf4_dot)(const uint8_t *packed, const float *scales, int64_t blocks, const float *high, const float *low,
                    int64_t stride, int rows, float *sums);
    /* out[0 .. n] = values * scale, rounded to `type`; `stream` as above */
    void (*int8_dequantize)(const int8_t *values, float scale, int64_t n, void *out, int type, int stream);
    /* sums[k] += dot(values, x + k * stride), the scale left out */
    void (*int8_dot)(const int8_t *values, int64_t n, const float *x, int64_t stride, int rows, float *sums);
    /* out[i] = dynamic[codes[i]] * scale + offset */
    void (*absmax_decode)(const uint8_t *codes, float scale, float offset, int64_t n, float *out);
};

extern const struct primitives graft_scalar;
void graft_absmax_decode(const uint8_t *codes, float scale, float offset, int64_t n, float *out); /* in plain C */
const struct primitives *graft_x86(int level);  /* 0 AVX2, 1 AVX-512; NULL where the processor lacks it */
const struct primitives *graft_neon(void);      /* NULL on other architectures */
void graft_fused_choose(int choice);            /* the set that `fused.c` uses: 0 plain C, then from plain to wide */
void graft_attention_choose(int choice);        /* the same of `attention.c` */
void graft_rows_choose(int choice);             /* the set that `rows.c` uses: 0 plain C, then from plain to wide */

/* A matrix as `gemm.c` reads it. Value (r, c) is number start + r * row + c; `along`: its rows run along the dimension that
 * is summed over (it is (K, N) or (K, M)), else they are the rows of A or the columns of B. */
enum matrix_kind {
    GRAFT_FLOAT32 = 0, GRAFT_BFLOAT16 = 1, GRAFT_NF4 = 2, GRAFT_INT8 = 3,
    GRAFT_Q4_0 = 4, GRAFT_Q4_1 = 5, GRAFT_Q5_0 = 6, GRAFT_Q5_1 = 7, GRAFT_Q8_0 = 8, GRAFT_Q4_K = 9, GRAFT_Q5_K = 10, GRAFT_Q6_K = 11,
};
struct graft_matrix {
    int64_t start, row;
    const void *values;
    const uint8_t *absmax; /* NF4 */
    const float *scale;    /* NF4: of each group; int8: of each row */
    const float *offset;   /* NF4 */
    int kind, along;
    int narrow; /* of B: both inputs of its matmul are rounded to bfloat16, accumulation is float32 */
    int unused;
};

/* The kinds from GRAFT_Q4_0 on are blocks of GGUF files (`blocks.c`): values and bytes of one block. */
static inline int64_t graft_block_length(int kind) { return kind >= GRAFT_Q4_K ? 256 : 32; }
static inline int64_t graft_block_bytes(int kind) {
    static const uint8_t bytes[] = {18, 20, 22, 24, 34, 144, 176, 210};
    return bytes[kind - GRAFT_Q4_0];
}

/* to[0 .. count] = values first .. first + count of row `row`, in blocks of a GGUF file. */
void graft_block_range(const struct graft_matrix *w, int64_t row, int64_t first, int64_t count, float *to);

/* y[k * y_row + o] = dot(x row k, W row o) for k < rows and first <= o < last; W in blocks of a GGUF file. */
void graft_block_outputs(const struct graft_matrix *w, int64_t first, int64_t last, const float *x, int64_t stride, int64_t rows,
                         float *y, int64_t y_row);

/* A dynamic 8-bit type, as `reference_adamw.Code` describes it. */
enum { GRAFT_DECADES = 7 };
struct graft_code {
    const float *values; /* (256,) */
    float starts[GRAFT_DECADES];
    float density[GRAFT_DECADES + 1], last[GRAFT_DECADES + 1], bend[GRAFT_DECADES + 1]; /* in front of the first decade, and in each */
    int32_t offset, largest;
};

/* One step of AdamW over a parameter (`adamw.c`). The moments are float32, or codes where `mean_scale` is given. */
struct graft_adamw {
    void *parameter;
    const void *gradient;
    void *mean, *square;
    void *mean_scale, *square_scale;
    const struct graft_code *mean_code, *square_code;
    int64_t count;
    float factor, beta1, rest1, beta2, rest2, epsilon, decay, rate, fix;
    uint32_t start, turn; /* `word_keys` of counter.py */
    int parameter_type, gradient_type;
};

/* Distance between rows of x that is split for NF4: rows a power of two apart fall on the same few lines of the cache, so
 * each lies 256 bytes off from the last one. */
static inline int64_t graft_half(int64_t in) { return (in / 2 + 1 + 1023) / 1024 * 1024 + 64; }

/* to[0 .. last - first] = values first .. last of packed NF4 codes; the codes of one row of int8 times its scale. */
void graft_nf4_range(const uint8_t *packed, const uint8_t *absmax, const float *group_scale, float offset, int64_t first,
                     int64_t last, float *to);
void graft_int8_range(const int8_t *values, float scale, int64_t count, float *to);

/* y (rows, y_row)[first .. last] = x W^T for rows <= MAX_ROWS and an NF4 weight; x (rows, in) comes as it is and split, its
 * values 0, 2, .. in `even` and 1, 3, .. in `odd`, rows `graft_half(in)` apart. */
void graft_nf4_outputs(const struct graft_matrix *w, int64_t first, int64_t last, const float *x, int64_t stride, int rows,
                       const float *even, const float *odd, int64_t half, float *y, int64_t y_row);

/* One row of RMSNorm, of a gated activation, one head rotated in place, as in `fused.c`, float32. */
void graft_norm_row(const float *x, const float *w, float offset, float epsilon, int64_t n, float *y);
void graft_gate_row(const float *g, const float *u, int64_t n, float *y, int gelu);
void graft_rotate_head(float *x, const float *cosine, const float *sine, int64_t turned);

/* Causal attention within the segments of a packed row; strides in values, a head's features lie beside each other. */
struct graft_attention_call {
    const float *q, *k, *v, *dout;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head;
    int64_t heads, kv_heads, width, segments, window; /* window: keys that a query sees, itself the last; 0: all before it */
    const int64_t *ends;                              /* (segments + 1,) first token of each segment, and of what follows */
    float *out, *log_sums;                            /* (T, heads, width), (T, heads) */
    float *dq, *dk, *dv;                              /* (T, heads, width), (T, kv_heads, width) twice */
    float scale;
    int threads;
};

/* Calls work(context, first, last) over 0 .. count in pieces of `grain`, on up to `threads` threads. */
typedef void (*graft_work)(void *context, int64_t first, int64_t last);
void graft_parallel(int64_t count, int64_t grain, int threads, graft_work work, void *context);

/* ---- float types, one value at a time ---- */

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) { /* nearest, ties to even */
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t to_float16(float value) { /* nearest, ties to even */
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and above round to infinity */
    if (size < 0x38800000) {                                  /* subnormal: let a float addition round at 2^-24 */
        float rounded = float_of(size) + 0.5f;
        return (uint16_t)(sign | (bits_of(rounded) - 0x3f000000));
    }
    size += 0xc8000fff + ((size >> 13) & 1);
    return (uint16_t)(sign | (size >> 13));
}

static inline float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff;
    if (size >= 0x7c00) return float_of(sign | 0x7f800000 | (size & 0x3ff) << 13);
    /* a product with 2^112 moves the exponent's bias and makes normal numbers of subnormal ones */
    return float_of(sign | bits_of(float_of(size << 13) * 0x1p112f));
}

static inline float load_float(const void *in, int type, int64_t i) {
    uint16_t half;
    float value;
    if (type == FLOAT32) {
        memcpy(&value, (const char *)in + 4 * i, 4);
        return value;
    }
    memcpy(&half, (const char *)in + 2 * i, 2);
    return type == BFLOAT16 ? float_of((uint32_t)half << 16) : from_float16(half);
}

static inline void store_float(void *out, int type, int64_t i, float value) {
    uint16_t half;
    if (type == FLOAT32) {
        memcpy((char *)out + 4 * i, &value, 4);
        return;
    }
    half = type == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
    memcpy((char *)out + 2 * i, &half, 2);
}

static inline int64_t float_bytes(int type) { return type == FLOAT32 ? 4 : 2; }

/* How many midpoints lie below `value`; a value that is not a number counts as above all, as torch.bucketize has it. */
static inline int nf4_nearest(float value) {
    int code = 0;
    for (int i = 0; i < 15; i++) code += !(value <= tables.midpoints[i]);
    return code;
}

static inline int nf4_code(const uint8_t *packed, int64_t i) { return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4; }

/* The larger magnitude of two, as bits: integers order floats, and put what is not a number above infinity. */
static inline uint32_t larger_magnitude(uint32_t largest, float value) {
    uint32_t size = bits_of(value) & 0x7fffffff;
    return size > largest ? size : largest;
}

#endif
