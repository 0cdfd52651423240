/* Rounds of blocks.c for fuzz.c: random blocks of every kind, against their formulas a value at a time. */

void graft_blocks_dequantize(const void *blocks, int kind, int64_t rows, int64_t in, int64_t first, int64_t columns, void *dense,
                             int type, int threads);
void graft_blocks_matvec(const void *blocks, int kind, int64_t out, int64_t in, const float *x, int64_t stride, int64_t rows,
                         float *y, int threads);

static float half_at(const uint8_t *from) { return from_float16((uint16_t)(from[0] | from[1] << 8)); }

/* Value i of a row of blocks: ggml-quants.c, one value at a time. */
static float block_value(const uint8_t *row, int kind, int64_t at) {
    const uint8_t *b = row + at / graft_block_length(kind) * graft_block_bytes(kind);
    const int i = (int)(at % graft_block_length(kind)), j = i % 16, part = i / 32;
    const int shift = i < 16 ? 0 : 4; /* of a small block's nibbles */
    if (kind == GRAFT_Q4_0) return half_at(b) * (float)((b[2 + j] >> shift & 15) - 8);
    if (kind == GRAFT_Q8_0) return half_at(b) * (float)(int8_t)b[2 + i];
    if (kind == GRAFT_Q5_0) return half_at(b) * (float)(((b[6 + j] >> shift & 15) | (b[2 + i / 8] >> i % 8 & 1) << 4) - 16);
    if (kind == GRAFT_Q4_1 || kind == GRAFT_Q5_1) {
        int code = kind == GRAFT_Q4_1 ? b[4 + j] >> shift & 15 : (b[8 + j] >> shift & 15) | (b[4 + i / 8] >> i % 8 & 1) << 4;
        float product = half_at(b) * (float)code;
        return product + half_at(b + 2);
    }
    if (kind == GRAFT_Q6_K) {
        int low = b[64 * (part / 4) + i % 64] >> (part % 4 < 2 ? 0 : 4) & 15, high = b[128 + 32 * (part / 4) + i % 32] >> 2 * (part % 4) & 3;
        float scale = half_at(b + 208) * (float)(int8_t)b[192 + i / 16];
        return scale * (float)((low | high << 4) - 32);
    }
    int s = part < 4 ? b[4 + part] & 63 : (b[8 + part] & 15) | b[part] >> 6 << 4;
    int t = part < 4 ? b[8 + part] & 63 : b[8 + part] >> 4 | b[4 + part] >> 6 << 4;
    int code = b[(kind == GRAFT_Q4_K ? 16 : 48) + 32 * (part / 2) + i % 32] >> (part % 2 ? 4 : 0) & 15;
    if (kind == GRAFT_Q5_K) code |= (b[16 + i % 32] >> part & 1) << 4;
    float product = half_at(b) * (float)s * (float)code;
    return product - half_at(b + 2) * (float)t;
}

/* A kind whose blocks rows of `in` values can be made of, or -1. */
static int random_block_kind(int64_t in) {
    if (in % 32) return -1;
    return GRAFT_Q4_0 + (int)below(in % 256 ? 5 : 8);
}

/* Rows of random blocks, with scales of about `size`; their values in `dense`. */
static uint8_t *random_blocks(int kind, int64_t rows, int64_t in, float size, float *dense) {
    const int64_t bytes = graft_block_bytes(kind), row = in / graft_block_length(kind) * bytes;
    uint8_t *blocks = take(rows * row, 1);
    for (int64_t i = 0; i < rows * row; i++) blocks[i] = (uint8_t)random_bits();
    for (int64_t b = 0; b < rows * row; b += bytes)
        for (int at = 0; at < (kind == GRAFT_Q4_1 || kind == GRAFT_Q5_1 || kind == GRAFT_Q4_K || kind == GRAFT_Q5_K ? 4 : 2); at += 2) {
            uint16_t half = to_float16((float)((int32_t)random_bits() * 0x1p-31) * size);
            memcpy(blocks + b + (kind == GRAFT_Q6_K ? 208 : at), &half, 2);
        }
    for (int64_t i = 0; i < rows * in; i++) dense[i] = block_value(blocks + i / in * row, kind, i % in);
    return blocks;
}

static void round_of_blocks(int sets) {
    int kind = GRAFT_Q4_0 + (int)below(8), type = (int)below(3), threads = 1 + (int)below(3);
    int64_t length = graft_block_length(kind), out = 1 + below(40), in = length * (1 + below(length == 32 ? 30 : 5));
    int64_t rows = below(2) ? 1 : 1 + below(70), stride = in + below(4), bytes = float_bytes(type);
    int64_t first = below(3) ? below(in) : 0, columns = below(3) ? 1 + below(in - first) : in - first;
    float *dense = take(out * in * 4, 4);
    uint8_t *blocks = random_blocks(kind, out, in, below(8) ? 0.1f : 1e-6f, dense);
    float *x = take(((rows - 1) * stride + in) * 4, 4), *y = take(rows * out * 4, 4), *alone = take(out * 4, 4);
    for (int64_t i = 0; i < (rows - 1) * stride + in; i++) x[i] = random_float();
    double *truth = take(rows * out * 8, 8), *size = take(rows * out * 8, 8);
    for (int64_t k = 0; k < rows; k++)
        for (int64_t o = 0; o < out; o++) {
            double sum = 0, all = 0;
            for (int64_t i = 0; i < in; i++) {
                double term = (double)dense[o * in + i] * x[k * stride + i];
                sum += term, all += fabs(term);
            }
            truth[k * out + o] = sum, size[k * out + o] = all;
        }
    void *part = take(out * columns * bytes, bytes), *expected = take(out * columns * bytes, bytes);
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < columns; i++) store_float(expected, type, o * columns + i, dense[o * in + first + i]);
    for (int choice = 0; choice < sets; choice++) {
        use_set(choice);
        graft_blocks_dequantize(blocks, kind, out, in, first, columns, part, type, threads);
        if (!same_bits(part, expected, out * columns * bytes)) fail("blocks dequantize", choice);
        graft_blocks_matvec(blocks, kind, out, in, x, stride, rows, y, threads);
        compare_products("blocks matvec", choice, y, truth, size, rows * out);
        int64_t one = below(rows);
        graft_blocks_matvec(blocks, kind, out, in, x + one * stride, stride, 1, alone, 1);
        if (!same_bits(alone, y + one * out, out * 4)) fail("a row of blocks by itself", choice);
    }
    free_all();
}
