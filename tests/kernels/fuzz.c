/* Random shapes, offsets, float types and thread counts through every exported operation and every instruction set of
 * this machine, against loops too simple to be wrong. Every buffer is exactly as long as it may be, so that
 * AddressSanitizer sees a byte read or written beyond; test_native_sanitized.py builds and runs it.
 *
 *     fuzz ROUNDS SEED
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels.h"

const char *graft_name(int choice);
int graft_init(const float *nf4, const float *midpoints, const float *dynamic, const uint8_t *bins, int choice);
void graft_nf4_dequantize(const uint8_t *packed, const uint8_t *absmax, const float *group_scale, const float *offset,
                          int64_t start, int64_t rows, int64_t in, int64_t columns, void *out, int type, int stream,
                          int threads);
void graft_nf4_quantize(const void *in, int type, int64_t n, uint8_t *packed, float *absmax, int threads);
void graft_absmax_quantize(const float *absmax, int64_t blocks, const float *offset, uint8_t *codes, float *scale,
                           int threads);
int graft_nf4_matvec(const uint8_t *packed, const uint8_t *absmax, const float *group_scale, const float *offset,
                     int64_t start, int64_t out, int64_t in, const float *x, int64_t stride, int64_t rows, float *y,
                     int threads);
void graft_int8_dequantize(const int8_t *values, const float *scale, int64_t rows, int64_t in, int64_t columns,
                           void *dense, int type, int stream, int threads);
void graft_int8_matvec(const int8_t *values, const float *scale, int64_t out, int64_t in, const float *x,
                       int64_t stride, int64_t rows, float *y, int threads);
int graft_attention(const struct graft_attention_call *p, int back);
int graft_gemm_choose(int choice);
int graft_gemm_narrow(void);
int graft_gemm(int64_t m, int64_t n, const int64_t *k, int terms, const struct graft_matrix *a,
               const struct graft_matrix *b, float *c, int64_t c_row, float alpha, int add, int threads);

static uint64_t state;

static uint32_t random_bits(void) { /* splitmix64 */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 16);
}

static int64_t below(int64_t n) { return (int64_t)(random_bits() % (uint32_t)n); }
static float random_float(void) { return (float)((int32_t)random_bits() * 0x1p-31) * powf(2, (float)(below(9) - 4)); }

/* `bytes` at an odd multiple of the element's size and no byte more; free_all gives everything back. */
static void *taken[512];
static int count_taken;

static void *take(int64_t bytes, int64_t step) {
    int64_t shift = (1 + below(15)) * step;
    char *base = malloc((size_t)(bytes + shift));
    if (!base) abort();
    taken[count_taken++] = base;
    return base + shift;
}

static void free_all(void) {
    while (count_taken) free(taken[--count_taken]);
}

static void fail(const char *what, int choice) {
    fprintf(stderr, "%s differs with %s\n", what, graft_name(choice));
    exit(1);
}

static struct tables made;

static void make_tables(void) {
    static const float nf4[16] = {-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                                  -0.091050036f, 0, 0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f,
                                  0.562617f, 0.72295684f, 1.0f};
    memcpy(made.nf4, nf4, sizeof nf4);
    for (int i = 0; i < 15; i++) made.midpoints[i] = (nf4[i] + nf4[i + 1]) / 2;
    for (int i = 0; i < 256; i++) made.dynamic[i] = (float)((i - 127) * abs(i - 127)) / 16384;
    for (int i = 0, code = 0; i < 65536; i++) {
        while (code < 255 && (made.dynamic[code] + made.dynamic[code + 1]) / 2 < 2.0f * (float)i / 65535 - 1) code++;
        made.bins[i] = (uint8_t)code;
    }
}

static void use_set(int choice) {
    if (graft_init(made.nf4, made.midpoints, made.dynamic, made.bins, choice) != choice) fail("the chosen set", choice);
}

static int same_bits(const void *a, const void *b, int64_t bytes) { return memcmp(a, b, (size_t)bytes) == 0; }

static void compare_products(const char *what, int choice, const float *y, const double *truth, const double *size,
                             int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!(fabs(y[i] - truth[i]) <= 1e-5 * size[i] + 1e-30)) fail(what, choice);
}

#include "fuzz_blocks.h"

static void round_of(int sets) {
    int type = (int)below(3), stream = (int)below(2), threads = 1 + (int)below(3);
    int64_t rows = 1 + below(19), out = 1 + below(70), in = 1 + below(below(2) ? 70 : 900), before = below(200);
    int64_t n = before + out * in, blocks = (n + BLOCK - 1) / BLOCK, groups = (blocks + GROUP - 1) / GROUP;
    int64_t columns = 1 + below(in), bytes = float_bytes(type);
    if (below(3) == 0) columns = in;

    void *dense = take(n * bytes, bytes);
    for (int64_t i = 0; i < n; i++) store_float(dense, type, i, random_float());
    if (below(8) == 0) store_float(dense, type, below(n), NAN);
    if (below(8) == 0) store_float(dense, type, below(n), INFINITY);

    /* quantize: plain C is the truth here, the Python tests compare it with the reference */
    uint8_t *packed = take((n + 1) / 2, 1), *packed_too = take((n + 1) / 2, 1);
    float *absmax = take(blocks * 4, 4), *absmax_too = take(blocks * 4, 4);
    uint8_t *codes = take(blocks, 1), *codes_too = take(blocks, 1);
    float *scale = take(groups * 4, 4), *scale_too = take(groups * 4, 4), offset = 0.5f;
    use_set(0);
    graft_nf4_quantize(dense, type, n, packed, absmax, 1);
    graft_absmax_quantize(absmax, blocks, &offset, codes, scale, 1);
    for (int choice = 1; choice < sets; choice++) {
        use_set(choice);
        graft_nf4_quantize(dense, type, n, packed_too, absmax_too, threads);
        graft_absmax_quantize(absmax_too, blocks, &offset, codes_too, scale_too, threads);
        if (!same_bits(packed, packed_too, (n + 1) / 2)) fail("packed", choice);
        for (int64_t i = 0; i < blocks; i++)
            if (absmax[i] != absmax_too[i] && !(isnan(absmax[i]) && isnan(absmax_too[i]))) fail("absmax", choice);
        if (!same_bits(codes, codes_too, blocks) || !same_bits(scale, scale_too, groups * 4)) fail("scales", choice);
    }

    /* from here on any codes and finite scales will do */
    for (int64_t i = 0; i < (n + 1) / 2; i++) packed[i] = (uint8_t)random_bits();
    for (int64_t i = 0; i < blocks; i++) codes[i] = (uint8_t)random_bits();
    for (int64_t i = 0; i < groups; i++) scale[i] = fabsf(random_float());
    float *values = take(out * in * 4, 4);
    for (int64_t i = 0; i < out * in; i++) {
        int64_t at = before + i, block = at / BLOCK;
        float product = made.dynamic[codes[block]] * scale[block / GROUP];
        values[i] = made.nf4[at % 2 ? packed[at / 2] & 15 : packed[at / 2] >> 4] * (product + offset);
    }
    int64_t stride = in + below(4);
    float *x = take(((rows - 1) * stride + in) * 4, 4), *y = take(rows * out * 4, 4);
    for (int64_t i = 0; i < (rows - 1) * stride + in; i++) x[i] = random_float();
    int8_t *bytes8 = take(out * in, 1);
    float *row_scale = take(out * 4, 4);
    for (int64_t i = 0; i < out * in; i++) bytes8[i] = (int8_t)(below(255) - 127);
    for (int64_t i = 0; i < out; i++) row_scale[i] = fabsf(random_float());
    double *truth = take(rows * out * 8, 8), *size = take(rows * out * 8, 8);
    double *truth8 = take(rows * out * 8, 8), *size8 = take(rows * out * 8, 8);
    for (int64_t k = 0; k < rows; k++)
        for (int64_t o = 0; o < out; o++) {
            double sum = 0, all = 0, sum8 = 0, all8 = 0;
            for (int64_t i = 0; i < in; i++) {
                double term = (double)values[o * in + i] * x[k * stride + i];
                double term8 = (double)bytes8[o * in + i] * row_scale[o] * x[k * stride + i];
                sum += term, all += fabs(term), sum8 += term8, all8 += fabs(term8);
            }
            truth[k * out + o] = sum, size[k * out + o] = all, truth8[k * out + o] = sum8, size8[k * out + o] = all8;
        }
    void *part = take(out * columns * bytes, bytes), *expected = take(out * columns * bytes, bytes);
    void *part8 = take(out * columns * bytes, bytes), *expected8 = take(out * columns * bytes, bytes);
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < columns; i++) {
            store_float(expected, type, o * columns + i, values[o * in + i]);
            store_float(expected8, type, o * columns + i, (float)bytes8[o * in + i] * row_scale[o]);
        }
    for (int choice = 0; choice < sets; choice++) {
        use_set(choice);
        graft_nf4_dequantize(packed, codes, scale, &offset, before, out, in, columns, part, type, stream, threads);
        if (!same_bits(part, expected, out * columns * bytes)) fail("nf4 dequantize", choice);
        graft_int8_dequantize(bytes8, row_scale, out, in, columns, part8, type, stream, threads);
        if (!same_bits(part8, expected8, out * columns * bytes)) fail("int8 dequantize", choice);
        if (graft_nf4_matvec(packed, codes, scale, &offset, before, out, in, x, stride, rows, y, threads))
            fail("nf4 matvec's memory", choice);
        compare_products("nf4 matvec", choice, y, truth, size, rows * out);
        graft_int8_matvec(bytes8, row_scale, out, in, x, stride, rows, y, threads);
        compare_products("int8 matvec", choice, y, truth8, size8, rows * out);
    }
    free_all();
}

/* A matrix of random values with `rows` of `row` values each, seen turned or not; its values as float32 in `dense`. */
static float *random_matrix(struct graft_matrix *w, int kind, int64_t rows, int64_t row) {
    if (kind >= GRAFT_Q4_0) {
        float *dense = take(rows * row * 4, 4);
        *w = (struct graft_matrix){.row = row, .values = random_blocks(kind, rows, row, 0.1f, dense), .kind = kind};
        return dense;
    }
    int64_t before = kind == GRAFT_INT8 ? 0 : below(100), gap = kind == GRAFT_NF4 || kind == GRAFT_INT8 ? 0 : below(5);
    int64_t stride = row + gap, n = before + (rows - 1) * stride + row, blocks = (n + BLOCK - 1) / BLOCK;
    int64_t groups = (blocks + GROUP - 1) / GROUP;
    uint8_t *absmax = take(blocks, 1);
    float *scale = take((kind == GRAFT_INT8 ? rows : groups) * 4, 4), *offset = take(4, 4);
    float *dense = take(rows * row * 4, 4);
    void *values = take(kind == GRAFT_FLOAT32 ? n * 4 : kind == GRAFT_BFLOAT16 ? n * 2 : kind == GRAFT_NF4 ? (n + 1) / 2 : n,
                        kind == GRAFT_FLOAT32 ? 4 : kind == GRAFT_BFLOAT16 ? 2 : 1);
    *offset = 0.5f;
    for (int64_t i = 0; i < blocks; i++) absmax[i] = (uint8_t)random_bits();
    for (int64_t i = 0; i < (kind == GRAFT_INT8 ? rows : groups); i++) scale[i] = fabsf(random_float());
    for (int64_t i = 0; i < (kind == GRAFT_NF4 ? (n + 1) / 2 : n); i++) {
        if (kind == GRAFT_FLOAT32 || kind == GRAFT_BFLOAT16)
            store_float(values, kind == GRAFT_FLOAT32 ? FLOAT32 : BFLOAT16, i, random_float());
        else
            ((uint8_t *)values)[i] = (uint8_t)random_bits();
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < row; i++) {
            int64_t at = before + r * stride + i;
            float *to = dense + r * row + i;
            if (kind == GRAFT_FLOAT32 || kind == GRAFT_BFLOAT16)
                *to = load_float(values, kind == GRAFT_FLOAT32 ? FLOAT32 : BFLOAT16, at);
            else if (kind == GRAFT_INT8)
                *to = (float)((int8_t *)values)[at] * scale[r];
            else
                *to = made.nf4[nf4_code(values, at)] * (made.dynamic[absmax[at / BLOCK]] * scale[at / BLOCK / GROUP] + *offset);
        }
    *w = (struct graft_matrix){before, stride, values, absmax, scale, offset, kind, 0, 0, 0};
    return dense;
}

/* Random sizes, kinds and orientations through the matrix product, where this processor has it. */
static void round_of_products(void) {
    int64_t m = 1 + below(below(2) ? 30 : 130), n = 1 + below(below(2) ? 40 : 200), k[2];
    if (below(4) == 0) n = 64 * (1 + below(8));
    int64_t c_row = n + below(3);
    int terms = 1 + (int)below(2), add = (int)below(2), threads = 1 + (int)below(3);
    struct graft_matrix a[2], b[2];
    float *c = take(((m - 1) * c_row + n) * 4, 4), alpha = below(2) ? 1 : 0.5f;
    double *truth = take(m * n * 8, 8), *size = take(m * n * 8, 8);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float old = random_float();
            c[i * c_row + j] = old;
            truth[i * n + j] = add ? old : 0, size[i * n + j] = add ? fabsf(old) : 0;
        }
    for (int t = 0; t < terms; t++) {
        k[t] = 1 + below(below(2) ? 40 : 600);
        int a_along = (int)below(2), b_along = (int)below(2), blocks = below(3) == 0;
        if (blocks && !b_along) k[t] = (k[t] + 31) / 32 * 32;
        if (blocks && below(2)) k[t] = 256 * (1 + below(2));
        const int of_blocks = blocks ? random_block_kind(b_along ? n : k[t]) : -1;
        float *left = random_matrix(&a[t], GRAFT_FLOAT32, a_along ? k[t] : m, a_along ? m : k[t]);
        float *right = random_matrix(&b[t], of_blocks < 0 ? (int)below(4) : of_blocks, b_along ? k[t] : n, b_along ? n : k[t]);
        a[t].along = a_along, b[t].along = b_along;
        int narrow = b[t].narrow = graft_gemm_narrow() && below(3) == 0;
        if (narrow && n > 64) { /* as gemm.c has it: narrower ones are not worth it */
            for (int64_t i = 0; i < m * k[t]; i++) left[i] = float_of((uint32_t)to_bfloat16(left[i]) << 16);
            for (int64_t i = 0; i < n * k[t]; i++) right[i] = float_of((uint32_t)to_bfloat16(right[i]) << 16);
        }
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++)
                for (int64_t l = 0; l < k[t]; l++) {
                    double product = (double)(a_along ? left[l * m + i] : left[i * k[t] + l]) *
                                     (b_along ? right[l * n + j] : right[j * k[t] + l]) * alpha;
                    truth[i * n + j] += product, size[i * n + j] += fabs(product);
                }
    }
    if (graft_gemm(m, n, k, terms, a, b, c, c_row, alpha, add, threads)) fail("the product's memory", 2);
    for (int64_t i = 0; i < m; i++) compare_products("the product", 2, c + i * c_row, truth + i * n, size + i * n, n);
    free_all();
}

/* Random segments through attention, forward and backward, against the formula written out. */
static void round_of_attention(int sets) {
    int64_t segments = 1 + below(3), group = 1 + below(2), kv_heads = 1 + below(2), heads = group * kv_heads, tokens = 0;
    int64_t width = 16 * (1 + below(3)), window = below(2) ? 0 : 1 + below(20), *ends = take((segments + 1) * 8, 8);
    for (int64_t i = 0; i <= segments; i++) ends[i] = tokens, tokens += i < segments ? 1 + below(40) : 0;
    int64_t q_n = tokens * heads * width, k_n = tokens * kv_heads * width;
    float *q = take(q_n * 4, 4), *k = take(k_n * 4, 4), *v = take(k_n * 4, 4), *dout = take(q_n * 4, 4);
    float *out = take(q_n * 4, 4), *sums = take(tokens * heads * 4, 4);
    float *dq = take(q_n * 4, 4), *dk = take(k_n * 4, 4), *dv = take(k_n * 4, 4);
    double *o = take(q_n * 8, 8), *tq = take(q_n * 8, 8), *tk = take(k_n * 8, 8), *tv = take(k_n * 8, 8);
    for (int64_t i = 0; i < q_n; i++) q[i] = random_float() / 4, dout[i] = random_float(), o[i] = tq[i] = 0;
    for (int64_t i = 0; i < k_n; i++) k[i] = random_float() / 4, v[i] = random_float(), tk[i] = tv[i] = 0;
    const double scale = 0.25;
    for (int64_t s = 0; s < segments; s++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = ends[s]; i < ends[s + 1]; i++) {
                double p[41], slope[41], most = -1e300, sum = 0, delta = 0;
                const float *qi = q + (i * heads + h) * width, *gi = dout + (i * heads + h) * width;
                int64_t from = window && i - window + 1 > ends[s] ? i - window + 1 : ends[s];
                for (int64_t j = from; j <= i; j++) {
                    double dot = 0;
                    for (int64_t d = 0; d < width; d++) dot += (double)qi[d] * k[(j * kv_heads + h / group) * width + d];
                    p[j - from] = scale * dot;
                    if (p[j - from] > most) most = p[j - from];
                }
                for (int64_t j = from; j <= i; j++) sum += p[j - from] = exp(p[j - from] - most);
                for (int64_t j = from; j <= i; j++) {
                    const float *vj = v + (j * kv_heads + h / group) * width;
                    p[j - from] /= sum, slope[j - from] = 0;
                    for (int64_t d = 0; d < width; d++) {
                        o[(i * heads + h) * width + d] += p[j - from] * vj[d];
                        slope[j - from] += (double)gi[d] * vj[d];
                    }
                    delta += p[j - from] * slope[j - from];
                }
                for (int64_t j = from; j <= i; j++) {
                    int64_t at = (j * kv_heads + h / group) * width;
                    double ds = p[j - from] * (slope[j - from] - delta) * scale;
                    for (int64_t d = 0; d < width; d++) {
                        tq[(i * heads + h) * width + d] += ds * k[at + d], tk[at + d] += ds * qi[d];
                        tv[at + d] += p[j - from] * gi[d];
                    }
                }
            }
    struct graft_attention_call call = {
        .q = q, .k = k, .v = v, .dout = dout, .q_token = heads * width, .q_head = width, .k_token = kv_heads * width,
        .k_head = width, .v_token = kv_heads * width, .v_head = width, .dout_token = heads * width, .dout_head = width,
        .heads = heads, .kv_heads = kv_heads, .width = width, .segments = segments, .window = window, .ends = ends,
        .out = out, .log_sums = sums, .dq = dq, .dk = dk, .dv = dv, .scale = (float)scale, .threads = 1 + (int)below(3)};
    for (int choice = 0; choice < sets; choice++) {
        use_set(choice);
        if (graft_attention(&call, 0) || graft_attention(&call, 1)) fail("attention's memory", choice);
        const float *found[] = {out, dq, dk, dv};
        const double *truth[] = {o, tq, tk, tv};
        /* Gradients are differences of sums that reach some hundreds: where they cancel, float32 leaves a few 1e-4. */
        for (int t = 0; t < 4; t++)
            for (int64_t i = 0; i < (t < 2 ? q_n : k_n); i++)
                if (!(fabs(found[t][i] - truth[t][i]) <= 5e-4 + 1e-4 * fabs(truth[t][i]))) fail("attention", choice);
    }
    free_all();
}

#include "fuzz_fused.h"
#include "fuzz_adamw.h"
#include "fuzz_layers.h"

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 100, sets = 0;
    state = count > 2 ? (uint64_t)atoll(arguments[2]) : 1;
    make_tables();
    while (sets < 3 && graft_name(sets)) printf("%s\n", graft_name(sets++));
    for (int i = 0; i < rounds; i++) round_of(sets);
    for (int i = 0; i < rounds; i++) round_of_fused(sets);
    for (int i = 0; i < rounds; i++) round_of_attention(sets);
    for (int i = 0; i < rounds; i++) round_of_adamw(sets);
    for (int i = 0; i < 3 * rounds; i++) {
        use_set(i % sets);
        round_of_layers(i % sets);
        free_all();
    }
    for (int i = 0; i < 2 * rounds; i++) round_of_blocks(sets);
    use_set(sets - 1);
    for (int choice = 1; choice <= 2; choice++) { /* AVX2, AVX-512 */
        if (graft_gemm_choose(choice) != choice) continue;
        for (int i = 0; i < rounds; i++) round_of_products();
        printf("products too: %d\n", choice);
    }
    printf("%d rounds\n", rounds);
    return 0;
}
