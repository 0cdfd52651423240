/* Rounds of fused.c for fuzz.c, against the formulas in double precision. */

void graft_norm(const void *x, const float *w, float offset, float epsilon, int64_t rows, int64_t n, void *y, float *r,
                int type, int threads);
void graft_norm_back(const void *dy, const void *x, const float *w, float offset, float *r, int64_t rows, int64_t n,
                     void *dx, float *dw, float *partial, int type, int threads);
void graft_gate(const void *g, const void *u, int64_t row, int64_t rows, int64_t n, void *y, int gelu, int type,
                int threads);
void graft_gate_back(const void *dy, const void *g, const void *u, int64_t row, int64_t rows, int64_t n, void *dg,
                     void *du, int64_t out_row, int gelu, int type, int threads);
struct rotary {
    const char *x;
    char *y;
    int64_t heads, x_token, x_head, y_token, y_head, unused;
};
void graft_rotary(const struct rotary *parts, int64_t count, int64_t tokens, int64_t d, int64_t turned,
                  const float *cosine, const float *sine, int64_t period, int back, int type, int threads);
int graft_cross_entropy(void *logits, int64_t rows, int64_t n, const int64_t *labels, const float *weights,
                        float *losses, int type, int threads);

static void *take_random(int64_t n, int type) {
    void *values = take(n * float_bytes(type), float_bytes(type));
    for (int64_t i = 0; i < n; i++) store_float(values, type, i, random_float());
    return values;
}

/* `size` is how large the terms were that the value is a sum of. */
static void compare_fused(const char *what, int choice, int type, const void *found, int64_t i, double truth, double size) {
    double tolerance = type == FLOAT32 ? 3e-6 : 8e-3;
    if (!(fabs(load_float(found, type, i) - truth) <= tolerance * (fabs(truth) + size) + 1e-30)) fail(what, choice);
}

static void round_of_norms(int choice) {
    int type = (int)below(2), threads = 1 + (int)below(3);
    int64_t rows = 1 + below(150), n = 1 + below(90);
    float offset = (float)below(2), epsilon = 1e-5f, *w = take_random(n, FLOAT32), *r = take(rows * 4, 4);
    void *x = take_random(rows * n, type), *dy = take_random(rows * n, type);
    void *y = take(rows * n * float_bytes(type), float_bytes(type)), *dx = take(rows * n * float_bytes(type), float_bytes(type));
    float *dw = take(n * 4, 4), *partial = take((rows + 63) / 64 * n * 4, 4);
    double *sum = take(n * 8, 8), *size = take(n * 8, 8);
    for (int64_t i = 0; i < n; i++) sum[i] = size[i] = 0;
    graft_norm(x, w, offset, epsilon, rows, n, y, r, type, threads);
    graft_norm_back(dy, x, w, offset, r, rows, n, dx, NULL, NULL, type, threads);
    for (int with_weight = 0; with_weight < 2; with_weight++) {
        if (with_weight) graft_norm_back(dy, x, w, offset, r, rows, n, dx, dw, partial, type, threads);
        for (int64_t row = 0; row < rows; row++) {
            double square = 0, mean = 0, all = 0;
            for (int64_t i = 0; i < n; i++) square += pow(load_float(x, type, row * n + i), 2) / (double)n;
            double own = 1 / sqrt(square + epsilon);
            if (!(fabs(r[row] - own) <= 1e-5 * own)) fail("the size of a row", choice);
            for (int64_t i = 0; i < n; i++) {
                double value = load_float(x, type, row * n + i), up = load_float(dy, type, row * n + i), g = up * (w[i] + offset);
                compare_fused("norm", choice, type, y, row * n + i, value * own * (w[i] + offset), 0);
                mean += g * value / (double)n, all += fabs(g * value) / (double)n;
                if (with_weight) sum[i] += up * value * own, size[i] += fabs(up * value * own);
            }
            for (int64_t i = 0; i < n; i++) {
                double value = load_float(x, type, row * n + i), g = load_float(dy, type, row * n + i) * (double)(w[i] + offset);
                compare_fused("norm's gradient", choice, type, dx, row * n + i, own * g - value * own * own * own * mean,
                              own * fabs(g) + fabs(value) * own * own * own * all);
            }
        }
    }
    for (int64_t i = 0; i < n; i++) compare_fused("norm's weight gradient", choice, FLOAT32, dw, i, sum[i], size[i]);
    free_all();
}

static void round_of_gates(int choice) {
    int type = (int)below(2), threads = 1 + (int)below(3), gelu = (int)below(2), halves = (int)below(2);
    int64_t rows = 1 + below(40), n = 1 + below(90), row = halves ? 2 * n : n, size = float_bytes(type);
    char *g = take_random(rows * row, type), *u = halves ? g + n * size : take_random(rows * n, type);
    char *dg = take(rows * row * size, size), *du = halves ? dg + n * size : take(rows * n * size, size);
    void *dy = take_random(rows * n, type), *y = take(rows * n * size, size);
    graft_gate(g, u, row, rows, n, y, gelu, type, threads);
    graft_gate_back(dy, g, u, row, rows, n, dg, du, row, gelu, type, threads);
    for (int64_t k = 0; k < rows; k++)
        for (int64_t i = 0; i < n; i++) {
            double gate = load_float(g, type, k * row + i), up = load_float(u, type, k * row + i);
            double d = load_float(dy, type, k * n + i), scale = sqrt(8 / 3.14159265358979323846);
            double a = gelu ? scale * (gate + 0.044715 * gate * gate * gate) : gate;
            double slope = gelu ? scale * (1 + 3 * 0.044715 * gate * gate) : 1, s = 1 / (1 + exp(-a)), other = 1 / (1 + exp(a));
            double more = gelu ? fabs(a) : 0; /* e^a has the rounding error of a */
            compare_fused("gate", choice, type, y, k * n + i, gate * s * up, fabs(gate * s * up) * more);
            compare_fused("gate's gradient", choice, type, dg, k * row + i, d * up * (s + gate * s * other * slope),
                          fabs(d * up) * (s + fabs(gate * s * other * slope)) * (1 + more));
            compare_fused("up's gradient", choice, type, du, k * row + i, d * gate * s, fabs(d * gate * s) * more);
        }
    free_all();
}

static void round_of_rotations(int choice) {
    int type = (int)below(2), threads = 1 + (int)below(3), back = (int)below(2);
    int64_t period = 1 + below(9), tokens = period * (1 + below(3)), half = 1 + below(40), turned = 2 * half, d = turned + below(5);
    float *c = take_random(period * turned, FLOAT32), *s = take_random(period * turned, FLOAT32);
    struct rotary parts[2];
    int64_t size = float_bytes(type);
    for (int p = 0; p < 2; p++) {
        int64_t heads = 1 + below(4), gap = below(3);
        parts[p] = (struct rotary){take_random(tokens * heads * (d + gap), type), take(tokens * heads * d * size, size), heads,
                                   heads * (d + gap), d + gap, heads * d, d, 0};
    }
    graft_rotary(parts, 2, tokens, d, turned, c, s, period, back, type, threads);
    for (int p = 0; p < 2; p++)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < parts[p].heads; h++)
                for (int64_t i = 0; i < d; i++) {
                    int64_t from = t * parts[p].x_token + h * parts[p].x_head, to = t * parts[p].y_token + h * parts[p].y_head;
                    double x = load_float(parts[p].x, type, from + i), truth = x, all = 0;
                    if (i < turned) {
                        int64_t pair = i < half ? i + half : i - half, row = t % period * turned;
                        double sine = back ? (i < half ? s[row + pair] : -s[row + pair]) : (i < half ? -s[row + i] : s[row + i]);
                        double other = load_float(parts[p].x, type, from + pair) * sine;
                        truth = x * c[row + i] + other, all = fabs(other) + fabs(x * c[row + i]);
                    }
                    compare_fused("rotary", choice, type, parts[p].y, to + i, truth, all);
                }
    free_all();
}

static void round_of_cross_entropies(int choice) {
    int type = (int)below(2), threads = 1 + (int)below(3);
    int64_t rows = 1 + below(20), n = 1 + below(below(2) ? 40 : 700), size = float_bytes(type);
    void *logits = take_random(rows * n, type), *before = take(rows * n * size, size);
    int64_t *labels = take(rows * 8, 8);
    float *weights = take_random(rows, FLOAT32), *losses = take(rows * 4, 4), *again = take(rows * 4, 4);
    for (int64_t k = 0; k < rows; k++) labels[k] = below(n);
    memcpy(before, logits, (size_t)(rows * n * size));
    labels[rows - 1] += below(2) ? n : -n;
    if (!graft_cross_entropy(logits, rows, n, labels, weights, losses, type, threads)) fail("a label out of range", choice);
    labels[rows - 1] = below(n);
    if (graft_cross_entropy(logits, rows, n, labels, NULL, again, type, threads)) fail("cross entropy", choice);
    if (!same_bits(logits, before, rows * n * size)) fail("logits that should stay", choice);
    if (graft_cross_entropy(logits, rows, n, labels, weights, losses, type, threads)) fail("cross entropy", choice);
    for (int64_t k = 0; k < rows; k++) {
        double most = -INFINITY, sum = 0;
        for (int64_t i = 0; i < n; i++) most = fmax(most, load_float(before, type, k * n + i));
        for (int64_t i = 0; i < n; i++) sum += exp(load_float(before, type, k * n + i) - most);
        double loss = log(sum) + most - load_float(before, type, k * n + labels[k]);
        compare_fused("loss", choice, FLOAT32, losses, k, loss, most < 0 ? 1 - most : 1 + most);
        compare_fused("loss alone", choice, FLOAT32, again, k, losses[k], 0);
        for (int64_t i = 0; i < n; i++) {
            double p = exp(load_float(before, type, k * n + i) - most) / sum, hit = i == labels[k];
            compare_fused("cross entropy's gradient", choice, type, logits, k * n + i, weights[k] * (p - hit),
                          fabs(weights[k]) * (hit + 1e-30));
        }
    }
    free_all();
}

static void round_of_fused(int sets) {
    for (int choice = 0; choice < sets; choice++) {
        use_set(choice);
        round_of_norms(choice);
        round_of_gates(choice);
        round_of_rotations(choice);
        round_of_cross_entropies(choice);
    }
}
