/* Rounds of layers.c for fuzz.c: small models of random shapes, weights of every kind, adapters on some rows, prompts and
 * single tokens, against the same formulas a value at a time in double precision. */

#include "layers.h"

int graft_layers(const struct stack *s, const struct pass *p);

enum { MOST = 4096 };

/* A weight (out, in) of a random kind, and its values in `dense`. */
static void random_weight(struct graft_matrix *w, int64_t out, int64_t in, float *dense) {
    const float size = 1 / sqrtf((float)in);
    memset(w, 0, sizeof *w);
    w->row = in, w->kind = (int)below(4), w->along = 0;
    if (in % 32 == 0 && below(4)) {
        w->kind = random_block_kind(in);
        w->values = random_blocks(w->kind, out, in, w->kind >= GRAFT_Q4_K ? size / 2000 : w->kind == GRAFT_Q8_0 ? size / 127 : size / 16, dense);
        return;
    }
    if (w->kind == GRAFT_FLOAT32 || w->kind == GRAFT_BFLOAT16) {
        int type = w->kind == GRAFT_FLOAT32 ? FLOAT32 : BFLOAT16;
        void *values = take(out * in * float_bytes(type), float_bytes(type));
        for (int64_t i = 0; i < out * in; i++) {
            store_float(values, type, i, (float)((int32_t)random_bits() * 0x1p-31) * size);
            dense[i] = load_float(values, type, i);
        }
        w->values = values;
    } else if (w->kind == GRAFT_INT8) {
        int8_t *values = take(out * in, 1);
        float *scale = take(out * 4, 4);
        for (int64_t i = 0; i < out; i++) scale[i] = size / 127;
        for (int64_t i = 0; i < out * in; i++) values[i] = (int8_t)(below(255) - 127), dense[i] = values[i] * scale[i / in];
        w->values = values, w->scale = scale;
    } else {
        int64_t before = below(100), n = before + out * in, blocks = (n + BLOCK - 1) / BLOCK, groups = (blocks + GROUP - 1) / GROUP;
        uint8_t *packed = take((n + 1) / 2, 1), *codes = take(blocks, 1);
        float *scale = take(groups * 4, 4), *offset = take(4, 4);
        for (int64_t i = 0; i < (n + 1) / 2; i++) packed[i] = (uint8_t)random_bits();
        for (int64_t i = 0; i < blocks; i++) codes[i] = (uint8_t)random_bits();
        for (int64_t i = 0; i < groups; i++) scale[i] = size / 2;
        *offset = size;
        for (int64_t i = 0; i < out * in; i++) {
            int64_t at = before + i, block = at / BLOCK;
            float product = made.dynamic[codes[block]] * scale[block / GROUP];
            dense[i] = made.nf4[at % 2 ? packed[at / 2] & 15 : packed[at / 2] >> 4] * (product + *offset);
        }
        w->start = before, w->values = packed, w->absmax = codes, w->scale = scale, w->offset = offset;
    }
}

static void norm_slowly(const double *x, const float *w, double offset, double epsilon, int64_t n, double *y) {
    double square = 0;
    for (int64_t i = 0; i < n; i++) square += x[i] * x[i] / (double)n;
    double r = 1 / sqrt(square + epsilon);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * r * (w[i] + offset);
}

static void multiply_slowly(const struct linear *linear, const float *dense, const struct factors *f, const double *x, double *y) {
    int64_t in = linear->weight.row, out = linear->out;
    for (int64_t o = 0; o < out; o++) {
        y[o] = linear->bias ? linear->bias[o] : 0;
        for (int64_t i = 0; i < in; i++) y[o] += dense[o * in + i] * x[i];
    }
    for (int64_t j = 0; f && j < f->rank; j++) {
        double h = 0;
        for (int64_t i = 0; i < in; i++) h += load_float(f->A, (int)f->a_type, j * in + i) * x[i];
        for (int64_t o = 0; o < out; o++) y[o] += f->scale * h * load_float(f->B, (int)f->b_type, j * out + o);
    }
}

static void turn_slowly(const struct stack *s, int64_t position, const float *norm, double *head) {
    const float *c = s->cosine + position * s->turned, *sine = s->sine + position * s->turned;
    int64_t half = s->turned / 2;
    if (norm) norm_slowly(head, norm, s->offset, s->epsilon, s->head_width, head);
    for (int64_t i = 0; i < half; i++) {
        double a = head[i], b = head[half + i];
        head[i] = a * c[i] - b * sine[i], head[half + i] = b * c[half + i] + a * sine[half + i];
    }
}

static void round_of_layers(int choice) {
    enum { LAYERS = 2, SEQUENCES = 3, BLOCKS = 4, MOST_LENGTH = 13 };
    int64_t keys = 1 + below(3), heads = keys * (1 + below(9)), d = 2 * (1 + below(12));
    int64_t width = below(3) ? 2 + below(90) : 32 * (1 + below(3)), inner = below(4) ? 1 + below(below(3) ? 120 : 1400) : 256 * (1 + below(5)), block = 1 + below(5);
    struct layer layer[LAYERS];
    struct stack s = {.layers = LAYERS, .width = width, .inner = inner, .heads = heads, .key_heads = keys, .head_width = d,
                      .turned = below(3) ? d : (d + 2) / 4 * 2, .block = block, .epsilon = 1e-5, .offset = (double)below(2),
                      .gelu = below(2), .last_norm = take_random(width, FLOAT32), .layer = layer};
    if (s.turned == 0) s.turned = d;
    float *cosine = take(BLOCKS * block * s.turned * 4, 4), *sine = take(BLOCKS * block * s.turned * 4, 4);
    for (int64_t i = 0; i < BLOCKS * block * s.turned; i++) cosine[i] = cosf((float)i), sine[i] = sinf(1.3f * (float)i);
    s.cosine = cosine, s.sine = sine;
    const int64_t q = heads * d, kv = keys * d, positions = SEQUENCES * BLOCKS * block;
    const int64_t out[7] = {q, kv, kv, width, inner, inner, width}, in[7] = {width, width, width, q, width, width, inner};
    float *dense[LAYERS][7];
    struct factors factors[2][LAYERS * 7];
    const struct factors *tables[2][LAYERS * 7];
    for (int i = 0; i < LAYERS; i++) {
        struct layer *l = layer + i;
        int norms = (int)below(2);
        *l = (struct layer){.norm = take_random(width, FLOAT32), .norm_again = take_random(width, FLOAT32),
                            .query_norm = norms ? take_random(d, FLOAT32) : NULL, .key_norm = norms ? take_random(d, FLOAT32) : NULL,
                            .keys = take(positions * kv * 4, 4), .values = take(positions * kv * 4, 4), .scale = 0.3,
                            .softcap = below(2) ? 0 : 2, .window = below(2) ? 0 : 1 + below(8)};
        struct linear *of[7] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (int j = 0; j < 7; j++) {
            dense[i][j] = take(out[j] * in[j] * 4, 4);
            random_weight(&of[j]->weight, out[j], in[j], dense[i][j]);
            of[j]->out = out[j], of[j]->number = 7 * i + j, of[j]->bias = below(2) ? NULL : take_random(out[j], FLOAT32);
            for (int a = 0; a < 2; a++) {
                int64_t r = 1 + below(below(4) ? 5 : 40), a_type = below(2), b_type = below(2);
                factors[a][7 * i + j] = (struct factors){take_random(r * in[j], (int)a_type), take_random(r * out[j], (int)b_type),
                                                         r, 0.01, a_type, b_type};
                tables[a][7 * i + j] = below(4) ? &factors[a][7 * i + j] : NULL;
            }
        }
    }
    /* the sequences: each has some past already, made by the slow way; here all new, in steps of random lengths */
    int64_t done[SEQUENCES] = {0};
    double *past_keys = take(LAYERS * positions * kv * 8, 8), *past_values = take(LAYERS * positions * kv * 8, 8);
    const int64_t blocks_of[SEQUENCES][BLOCKS] = {{7, 2, 11, 4}, {0, 9, 5, 3}, {10, 1, 8, 6}};
    for (int step = 0; step < 3; step++) {
        int64_t position[SEQUENCES * MOST_LENGTH], table[SEQUENCES * MOST_LENGTH][BLOCKS], of[SEQUENCES * MOST_LENGTH], T = 0;
        int64_t ranges[4];
        const struct factors *const *routes[2];
        int64_t count = 0;
        int slot_of[SEQUENCES * MOST_LENGTH];
        for (int n = 0; n < SEQUENCES; n++) {
            int64_t left = BLOCKS * block - done[n], length = step == 1 ? 1 : 1 + below(MOST_LENGTH), first = T;
            if (length > left) length = left;
            for (int64_t i = 0; i < length; i++, T++) {
                position[T] = done[n] + i, of[T] = n, slot_of[T] = n - 1; /* the first one uses the base alone */
                memcpy(table[T], blocks_of[n], sizeof table[T]);
            }
            if (n > 0 && T > first) {
                ranges[2 * count] = first, ranges[2 * count + 1] = T, routes[count] = tables[n - 1];
                count++;
            }
            done[n] += length;
        }
        if (T == 0) continue;
        float *x = take(T * width * 4, 4);
        double *truth = take(T * width * 8, 8);
        for (int64_t i = 0; i < T * width; i++) truth[i] = x[i] = random_float();
        struct pass p = {.rows = T, .threads = 1 + below(3), .x = x, .position = position, .table = table[0],
                         .table_stride = BLOCKS, .routes = count, .ranges = ranges, .factors = routes};
        if (graft_layers(&s, &p)) fail("memory for layers", choice);
        double *n = malloc(sizeof(double) * (size_t)(width + 2 * q + 2 * kv + 2 * inner + MOST)), *query = n + width;
        double *key = query + q, *value = key + kv, *mixed = value + kv, *gate = mixed + q, *up = gate + inner;
        if (!n) abort();
        for (int i = 0; i < LAYERS; i++) {
            const struct layer *l = layer + i;
            double *kept_keys = past_keys + i * positions * kv, *kept_values = past_values + i * positions * kv;
            for (int64_t t = 0; t < T; t++) { /* rows stand in the order of their positions */
                const struct factors *const *f = slot_of[t] < 0 ? NULL : tables[slot_of[t]];
                #define SHARE(j) (f ? f[7 * i + j] : NULL)
                double *row = truth + t * width;
                norm_slowly(row, l->norm, s.offset, s.epsilon, width, n);
                multiply_slowly(&l->q, dense[i][0], SHARE(0), n, query);
                multiply_slowly(&l->k, dense[i][1], SHARE(1), n, key);
                multiply_slowly(&l->v, dense[i][2], SHARE(2), n, value);
                for (int64_t h = 0; h < heads; h++) turn_slowly(&s, position[t], l->query_norm, query + h * d);
                for (int64_t h = 0; h < keys; h++) turn_slowly(&s, position[t], l->key_norm, key + h * d);
                int64_t at = (of[t] * BLOCKS * block + position[t]) * kv;
                for (int64_t c = 0; c < kv; c++) kept_keys[at + c] = key[c], kept_values[at + c] = value[c];
                for (int64_t h = 0; h < heads; h++) {
                    int64_t kh = h / (heads / keys), from = l->window && position[t] + 1 > l->window ? position[t] + 1 - l->window : 0;
                    double weight[BLOCKS * 8], most = -INFINITY, total = 0;
                    for (int64_t j = from; j <= position[t]; j++) {
                        double dot = 0;
                        for (int64_t c = 0; c < d; c++)
                            dot += query[h * d + c] * kept_keys[(of[t] * BLOCKS * block + j) * kv + kh * d + c];
                        dot *= l->scale;
                        weight[j] = l->softcap ? tanh(dot / l->softcap) * l->softcap : dot;
                        if (weight[j] > most) most = weight[j];
                    }
                    for (int64_t j = from; j <= position[t]; j++) total += weight[j] = exp(weight[j] - most);
                    for (int64_t c = 0; c < d; c++) {
                        double sum = 0;
                        for (int64_t j = from; j <= position[t]; j++)
                            sum += weight[j] / total * kept_values[(of[t] * BLOCKS * block + j) * kv + kh * d + c];
                        mixed[h * d + c] = sum;
                    }
                }
                multiply_slowly(&l->o, dense[i][3], SHARE(3), mixed, n);
                for (int64_t c = 0; c < width; c++) row[c] += n[c];
                norm_slowly(row, l->norm_again, s.offset, s.epsilon, width, n);
                multiply_slowly(&l->gate, dense[i][4], SHARE(4), n, gate);
                multiply_slowly(&l->up, dense[i][5], SHARE(5), n, up);
                for (int64_t c = 0; c < inner; c++) {
                    double g = gate[c];
                    gate[c] = up[c] * (s.gelu ? g * 0.5 * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) : g / (1 + exp(-g)));
                }
                multiply_slowly(&l->down, dense[i][6], SHARE(6), gate, n);
                for (int64_t c = 0; c < width; c++) row[c] += n[c];
                #undef SHARE
            }
        }
        double wrong = 0, all = 0;
        for (int64_t t = 0; t < T; t++) {
            norm_slowly(truth + t * width, s.last_norm, s.offset, s.epsilon, width, n);
            for (int64_t c = 0; c < width; c++) wrong += pow(x[t * width + c] - n[c], 2), all += n[c] * n[c];
        }
        free(n);
        if (!(sqrt(wrong) <= 5e-4 * sqrt(all))) { /* weights differ by 2^8, and one layer's rounding is the next one's input */
            fprintf(stderr, "off by %g\n", sqrt(wrong / all));
            fail("layers", choice);
        }
    }
}
