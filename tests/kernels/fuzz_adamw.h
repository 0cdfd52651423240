/* A part of fuzz.c: the optimizer's step and the sum of squares, against a value at a time and in every instruction set. */

void graft_adamw(const struct graft_adamw *step, int level, int threads);
int64_t graft_sum_parts(int64_t count);
double graft_sum_of_squares(const void *values, int type, int64_t count, double *parts, int level, int threads);

/* Seven decades of 1, 2, ... 64 (or 2, 4, ... 128) values each between 0 and 1, with their signs or without. */
static void make_code(struct graft_code *code, float *values, int is_signed) {
    int index = is_signed ? 128 : 1, count = is_signed ? 1 : 2;
    code->values = values, code->offset = is_signed, code->largest = is_signed ? 128 : 255;
    code->last[0] = -(float)is_signed, code->bend[0] = 1;
    values[is_signed ? 127 : 0] = 0, values[255] = 1;
    for (int d = 0; d < GRAFT_DECADES; d++, count *= 2) {
        float unit = powf(10, (float)(d - 6)), gap = 0.9f * unit / (float)count;
        code->starts[d] = 0.1f * unit + gap / 2;
        code->density[d + 1] = 1 / gap, code->last[d + 1] = (float)(count - 1), code->bend[d + 1] = d == 6 ? 2.001f : 0.33f;
        for (int i = 0; i < count; i++, index++) values[index] = code->starts[d] + gap * (float)i;
    }
    code->density[0] = 1 / code->starts[0];
    if (is_signed)
        for (int i = 1; i < 128; i++) values[127 - i] = -values[127 + i];
}

static uint32_t mixed(uint32_t word) {
    word = (word ^ word >> 16) * 0x7FEB352Du;
    word = (word ^ word >> 15) * 0x846CA68Bu;
    return word ^ word >> 16;
}

/* The number of one of the two magnitudes beside `share`, as `Code.pick` of reference_adamw.py has it. */
static int picked(float share, const struct graft_code *code, uint32_t bits) {
    int decade = 0; /* 0: in front of the first */
    while (decade < GRAFT_DECADES && share >= code->starts[decade]) decade++;
    float start = decade ? code->starts[decade - 1] : 0, last = code->last[decade];
    float place = (share - start) * code->density[decade];
    if (place > last) place = (place - last) * code->bend[decade] + last;
    place += ((float)bits + 0.5f) * 0x1p-15f;
    int index = (int)(place < 256 ? place : 256) + (int)last + code->offset;
    return index < code->largest ? index : code->largest;
}

/* Moments of `n` values as codes and scales of their blocks, a value at a time. */
static void narrowed(const float *m, const float *v, int64_t n, const struct graft_adamw *s, uint8_t *m_codes, uint8_t *v_codes,
                     float *m_scales, float *v_scales) {
    for (int64_t b = 0; b * 256 < n; b++) {
        m_scales[b] = v_scales[b] = 0;
        for (int64_t i = b * 256; i < n && i < (b + 1) * 256; i++) {
            if (fabsf(m[i]) > m_scales[b]) m_scales[b] = fabsf(m[i]);
            if (v[i] > v_scales[b]) v_scales[b] = v[i];
        }
    }
    for (int64_t i = 0; i < n; i++) {
        float m_scale = m_scales[i / 256], v_scale = v_scales[i / 256];
        uint32_t word = mixed(mixed(mixed((uint32_t)i + s->start) ^ s->turn) ^ 0x2545F491);
        int mean = picked(fabsf(m[i]) / (m_scale == 0 ? 1 : m_scale), s->mean_code, word & 0x7FFF);
        int square = picked(v[i] / (v_scale == 0 ? 1 : v_scale), s->square_code, word >> 17);
        m_codes[i] = (uint8_t)(m[i] < 0 ? 127 - (mean < 127 ? mean : 127) : 127 + mean);
        v_codes[i] = (uint8_t)(v[i] > 0 && square == 0 ? 1 : square);
    }
}

static void round_of_adamw(int sets) {
    int type = (int)below(2), slope = (int)below(2), eight = (int)below(2), threads = 1 + (int)below(3);
    int64_t n = 1 + below(below(2) ? 300 : 40000), blocks = (n + 255) / 256;
    static float mean_values[256], square_values[256];
    struct graft_code mean_code, square_code;
    make_code(&mean_code, mean_values, 1);
    make_code(&square_code, square_values, 0);
    float *p = take(n * 4, 4), *m = take(n * 4, 4), *v = take(n * 4, 4);
    uint8_t *mc = take(n, 1), *vc = take(n, 1);
    float *ms = take(blocks * 4, 4), *vs = take(blocks * 4, 4);
    void *parameter = take(n * float_bytes(type), float_bytes(type)), *gradient = take(n * float_bytes(slope), float_bytes(slope));
    struct graft_adamw s = {.gradient = gradient, .mean_code = &mean_code, .square_code = &square_code, .count = n,
                            .factor = 0.7f, .beta1 = 0.9f, .rest1 = 0.1f, .beta2 = 0.99f, .rest2 = 0.01f, .epsilon = 1e-8f,
                            .decay = 0.999f, .rate = 0.01f, .fix = 3.0f, .start = random_bits(), .turn = random_bits(),
                            .parameter_type = type, .gradient_type = slope};
    for (int64_t b = 0; b < blocks; b++) ms[b] = below(9) ? fabsf(random_float()) : 0, vs[b] = below(9) ? fabsf(random_float()) : 0;
    for (int64_t i = 0; i < n; i++) {
        store_float(parameter, type, i, random_float());
        store_float(gradient, slope, i, below(3) ? random_float() * powf(10, (float)(below(9) - 6)) : 0);
        mc[i] = (uint8_t)random_bits(), vc[i] = (uint8_t)random_bits();
        m[i] = eight ? mean_values[mc[i]] * ms[i / 256] : random_float();
        v[i] = eight ? square_values[vc[i]] * vs[i / 256] : fabsf(random_float());
    }
    /* what one value at a time gives */
    float *m_new = take(n * 4, 4), *v_new = take(n * 4, 4);
    uint16_t *p_half = take(n * 2, 2);
    double truth = 0;
    for (int64_t i = 0; i < n; i++) {
        float raw = load_float(gradient, slope, i), slope_of = raw * s.factor;
        truth += (double)raw * raw;
        m_new[i] = m[i] * s.beta1 + slope_of * s.rest1;
        v_new[i] = v[i] * s.beta2 + slope_of * slope_of * s.rest2;
        p[i] = load_float(parameter, type, i) * s.decay - m_new[i] / (sqrtf(v_new[i]) * s.fix + s.epsilon) * s.rate;
        uint32_t word = mixed(mixed((uint32_t)i + s.start) ^ s.turn);
        p_half[i] = (uint16_t)((bits_of(p[i]) + (word & 0xFFFF)) >> 16);
    }
    void *own_p = take(n * float_bytes(type), float_bytes(type)), *own_m = take(n * 4, 4), *own_v = take(n * 4, 4);
    float *own_ms = take(blocks * 4, 4), *own_vs = take(blocks * 4, 4);
    uint8_t *mc_new = take(n, 1), *vc_new = take(n, 1);
    float *ms_new = take(blocks * 4, 4), *vs_new = take(blocks * 4, 4);
    narrowed(m_new, v_new, n, &s, mc_new, vc_new, ms_new, vs_new);
    int64_t each = eight ? 1 : 4, parts = graft_sum_parts(n);
    double *room = take(parts * 8, 8), first_sum = 0;
    for (int choice = 0; choice < sets; choice++) {
        memcpy(own_p, parameter, (size_t)(n * float_bytes(type)));
        memcpy(own_m, eight ? (void *)mc : (void *)m, (size_t)(n * each));
        memcpy(own_v, eight ? (void *)vc : (void *)v, (size_t)(n * each));
        memcpy(own_ms, ms, (size_t)(blocks * 4)), memcpy(own_vs, vs, (size_t)(blocks * 4));
        s.parameter = own_p, s.mean = own_m, s.square = own_v;
        s.mean_scale = eight ? own_ms : NULL, s.square_scale = eight ? own_vs : NULL;
        graft_adamw(&s, choice, threads);
        if (!same_bits(own_p, type == FLOAT32 ? (void *)p : (void *)p_half, n * float_bytes(type))) fail("adamw's parameter", choice);
        if (!eight && !(same_bits(own_m, m_new, n * 4) && same_bits(own_v, v_new, n * 4))) fail("adamw's moments", choice);
        if (eight && !(same_bits(own_ms, ms_new, blocks * 4) && same_bits(own_vs, vs_new, blocks * 4))) fail("adamw's scales", choice);
        if (eight && !(same_bits(own_m, mc_new, n) && same_bits(own_v, vc_new, n))) fail("adamw's codes", choice);
        double sum = graft_sum_of_squares(gradient, slope, n, room, choice, threads);
        if (choice == 0) first_sum = sum;
        if (sum != first_sum || fabs(sum - truth) > 1e-12 * truth) fail("the sum of squares", choice);
    }
    free_all();
}
