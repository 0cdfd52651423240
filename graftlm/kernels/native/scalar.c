/* Every primitive in plain C: for processors without vector instructions that we know, and to read. */
#include "kernels.h"

static void nf4_dequantize(const uint8_t *packed, const float *scales, int64_t blocks, void *out, int type,
                           int stream) {
    (void)stream;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = b * BLOCK; i < (b + 1) * BLOCK; i++)
            store_float(out, type, i, tables.nf4[nf4_code(packed, i)] * scales[b]);
}

static void nf4_quantize(const void *in, int type, int64_t blocks, uint8_t *packed, float *absmax) {
    for (int64_t b = 0; b < blocks; b++) {
        uint32_t largest = 0;
        for (int64_t i = b * BLOCK; i < (b + 1) * BLOCK; i++) largest = larger_magnitude(largest, load_float(in, type, i));
        float scale = float_of(largest);
        absmax[b] = scale;
        float inverse = 1.0f / (scale < 1e-38f ? 1e-38f : scale);
        for (int64_t i = b * BLOCK; i < (b + 1) * BLOCK; i += 2) {
            int high = nf4_nearest(load_float(in, type, i) * inverse);
            int low = nf4_nearest(load_float(in, type, i + 1) * inverse);
            packed[i / 2] = (uint8_t)(high << 4 | low);
        }
    }
}

static void nf4_dot(const uint8_t *packed, const float *scales, int64_t blocks, const float *high, const float *low,
                    int64_t stride, int rows, float *sums) {
    for (int k = 0; k < rows; k++) {
        const float *h = high + k * stride, *l = low + k * stride;
        for (int64_t b = 0; b < blocks; b++) {
            float sum = 0;
            for (int64_t j = b * BLOCK_BYTES; j < (b + 1) * BLOCK_BYTES; j++)
                sum += tables.nf4[packed[j] >> 4] * h[j] + tables.nf4[packed[j] & 15] * l[j];
            sums[k] += sum * scales[b];
        }
    }
}

static void int8_dequantize(const int8_t *values, float scale, int64_t n, void *out, int type, int stream) {
    (void)stream;
    for (int64_t i = 0; i < n; i++) store_float(out, type, i, (float)values[i] * scale);
}

static void int8_dot(const int8_t *values, int64_t n, const float *x, int64_t stride, int rows, float *sums) {
    for (int k = 0; k < rows; k++)
        for (int64_t first = 0; first < n; first += BLOCK) { /* sums of sums: the error grows with n / 64 */
            float sum = 0;
            for (int64_t i = first; i < n && i < first + BLOCK; i++) sum += (float)values[i] * x[k * stride + i];
            sums[k] += sum;
        }
}

void graft_absmax_decode(const uint8_t *codes, float scale, float offset, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        float product = tables.dynamic[codes[i]] * scale;
        out[i] = product + offset;
    }
}

const struct primitives graft_scalar = {
    "scalar C", nf4_dequantize, nf4_quantize, nf4_dot, int8_dequantize, int8_dot, graft_absmax_decode,
};
