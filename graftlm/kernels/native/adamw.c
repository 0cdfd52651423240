/* One fused AdamW step: parameter, gradient and both moments are read once and written once, with clipping, weight
 * decay, stochastic rounding and the codes of 8-bit moments on the way. `reference_adamw.py` has the formula and its reasons.
 *
 * Every operation rounds by itself, as the reference's does, so the results are the reference's bit for bit, whatever the
 * instruction set and the number of threads. The loops are plain C over blocks of 256 values, which the compiler turns into
 * vector code three times: for any processor, for AVX2 and for AVX-512.
 */
#include <math.h>
#include <stdlib.h>

#include "kernels.h"

enum { VALUES = 256, GRAIN = 64, LANES = 8, PART = 1 << 14 };
/* VALUES: that share one scale. GRAIN: blocks that a thread takes at once. PART: values whose squares are summed before
 * they meet others. */

typedef float any_float __attribute__((aligned(1), may_alias));
typedef uint16_t any_half __attribute__((aligned(1), may_alias));

static const uint32_t other_bits = 0x2545F491;
enum { ZERO_MEAN_CODE = 127, LAST_NEGATIVE = 127 };

INLINE uint32_t mix(uint32_t word) { /* lowbias32 */
    word ^= word >> 16;
    word *= 0x7FEB352Du;
    word ^= word >> 15;
    word *= 0x846CA68Bu;
    return word ^ word >> 16;
}

INLINE float read_float(const void *from, int type, int64_t i) {
    return type == FLOAT32 ? ((const any_float *)from)[i] : float_of((uint32_t)((const any_half *)from)[i] << 16);
}

/* The largest magnitude of a block, and what to divide by: 1 where all are zero. */
INLINE float largest_of(const float *values, int n, float *divisor) {
    uint32_t largest = 0;
    for (int i = 0; i < n; i++) largest = larger_magnitude(largest, values[i]);
    *divisor = largest ? float_of(largest) : 1.0f;
    return float_of(largest);
}

/* Where a share in [0, 1] of a block's scale lies among the magnitudes of a code, rounded down or up at random. Choosing
 * among seven decades by comparison, not from a table, is what lets the compiler do it for many values at once. */
INLINE int32_t pick(float share, const struct graft_code *code, uint32_t bits) {
    float start = 0, density = code->density[0], last = code->last[0], bend = code->bend[0];
    for (int d = 0; d < GRAFT_DECADES; d++) {
        int inside = share >= code->starts[d];
        start = inside ? code->starts[d] : start;
        density = inside ? code->density[d + 1] : density;
        last = inside ? code->last[d + 1] : last;
        bend = inside ? code->bend[d + 1] : bend;
    }
    float place = (share - start) * density;
    float bent = (place - last) * bend + last;
    place = place > last ? bent : place;
    place = place + ((float)(int32_t)bits + 0.5f) * 0x1p-15f;
    place = place < 256.0f ? place : 256.0f; /* also what is not a number */
    int32_t index = (int32_t)place + (int32_t)last + code->offset;
    return index < code->largest ? index : code->largest;
}

INLINE void step_block(const struct graft_adamw *s, int64_t at, int n, int parameter_type, int gradient_type, int eight) {
    float means[VALUES], squares[VALUES];
    uint32_t words[VALUES];
    const float factor = s->factor, beta1 = s->beta1, rest1 = s->rest1, beta2 = s->beta2, rest2 = s->rest2;
    const float epsilon = s->epsilon, decay = s->decay, rate = s->rate, fix = s->fix;
    const uint32_t start = (uint32_t)at + s->start, turn = s->turn;
    uint8_t *restrict mean_codes = (uint8_t *)s->mean + at, *restrict square_codes = (uint8_t *)s->square + at;
    any_float *restrict mean_floats = (any_float *)s->mean + at, *restrict square_floats = (any_float *)s->square + at;
    any_float *restrict floats = (any_float *)s->parameter + at;
    any_half *restrict halves = (any_half *)s->parameter + at;
    const char *restrict gradient = (const char *)s->gradient + at * (gradient_type == FLOAT32 ? 4 : 2);
    float scale1 = 0, scale2 = 0;

    if (eight) {
        const float *values1 = s->mean_code->values, *values2 = s->square_code->values;
        scale1 = ((const any_float *)s->mean_scale)[at / VALUES], scale2 = ((const any_float *)s->square_scale)[at / VALUES];
        for (int i = 0; i < n; i++) means[i] = values1[mean_codes[i]];
        for (int i = 0; i < n; i++) squares[i] = values2[square_codes[i]];
    }
    if (eight || parameter_type != FLOAT32)
        for (int i = 0; i < n; i++) words[i] = mix(mix((uint32_t)i + start) ^ turn);
    for (int i = 0; i < n; i++) {
        float g = read_float(gradient, gradient_type, i) * factor;
        float p = parameter_type == FLOAT32 ? floats[i] : float_of((uint32_t)halves[i] << 16);
        float m = (eight ? means[i] * scale1 : mean_floats[i]) * beta1 + g * rest1;
        float v = (eight ? squares[i] * scale2 : square_floats[i]) * beta2 + g * g * rest2;
        float bottom = sqrtf(v) * fix + epsilon;
        p = p * decay - m / bottom * rate;
        if (eight) means[i] = m, squares[i] = v;
        else mean_floats[i] = m, square_floats[i] = v;
        if (parameter_type == FLOAT32) floats[i] = p;
        else halves[i] = (uint16_t)((bits_of(p) + (words[i] & 0xFFFF)) >> 16);
    }
    if (!eight) return;
    float divisor1, divisor2;
    ((any_float *)s->mean_scale)[at / VALUES] = largest_of(means, n, &divisor1);
    ((any_float *)s->square_scale)[at / VALUES] = largest_of(squares, n, &divisor2);
    const struct graft_code code1 = *s->mean_code, code2 = *s->square_code;
    for (int i = 0; i < n; i++) words[i] = mix(words[i] ^ other_bits);
    for (int i = 0; i < n; i++) {
        int32_t size = pick(fabsf(means[i]) / divisor1, &code1, words[i] & 0x7FFF);
        int32_t down = size < LAST_NEGATIVE ? size : LAST_NEGATIVE;
        mean_codes[i] = (uint8_t)(ZERO_MEAN_CODE + (means[i] < 0 ? -down : size));
    }
    for (int i = 0; i < n; i++) {
        int32_t size = pick(squares[i] / divisor2, &code2, words[i] >> 17);
        square_codes[i] = (uint8_t)(size | (squares[i] > 0 && size == 0)); /* never zero where there was a gradient */
    }
}

INLINE void step_blocks(const struct graft_adamw *s, int64_t first, int64_t last, int parameter_type, int gradient_type,
                        int eight) {
    for (int64_t block = first; block < last; block++) {
        int64_t at = block * VALUES, left = s->count - at;
        step_block(s, at, left < VALUES ? (int)left : VALUES, parameter_type, gradient_type, eight);
    }
}

INLINE void step_any(const struct graft_adamw *s, int64_t first, int64_t last) {
    int eight = s->mean_scale != NULL;
    if (s->parameter_type == FLOAT32 && s->gradient_type == FLOAT32 && !eight)
        step_blocks(s, first, last, FLOAT32, FLOAT32, 0);
    else if (s->parameter_type == FLOAT32 && s->gradient_type == FLOAT32)
        step_blocks(s, first, last, FLOAT32, FLOAT32, 1);
    else if (s->parameter_type == BFLOAT16 && s->gradient_type == BFLOAT16 && !eight)
        step_blocks(s, first, last, BFLOAT16, BFLOAT16, 0);
    else if (s->parameter_type == BFLOAT16 && s->gradient_type == BFLOAT16)
        step_blocks(s, first, last, BFLOAT16, BFLOAT16, 1);
    else
        step_blocks(s, first, last, s->parameter_type, s->gradient_type, eight);
}

/* The sum of the squares of values first .. last in float64, in LANES sums that meet at the end. */
INLINE double square_sum(const void *values, int type, int64_t first, int64_t last) {
    double sums[LANES] = {0};
    int64_t at = first;
    for (; at + LANES <= last; at += LANES)
        for (int j = 0; j < LANES; j++) {
            double value = (double)read_float(values, type, at + j);
            sums[j] += value * value;
        }
    for (int j = 0; at + j < last; j++) {
        double value = (double)read_float(values, type, at + j);
        sums[j] += value * value;
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

struct sum_job {
    const void *values;
    double *parts;
    int64_t count;
    int type, level;
};

INLINE void sum_parts_any(const struct sum_job *job, int64_t first, int64_t last) {
    for (int64_t part = first; part < last; part++) {
        int64_t begin = part * PART, end = begin + PART < job->count ? begin + PART : job->count;
        job->parts[part] = job->type == FLOAT32 ? square_sum(job->values, FLOAT32, begin, end)
                                                : square_sum(job->values, BFLOAT16, begin, end);
    }
}

/* ---- the same code for each instruction set ---- */

static void step_plain(void *context, int64_t first, int64_t last) { step_any(context, first, last); }
static void sum_plain(void *context, int64_t first, int64_t last) { sum_parts_any(context, first, last); }

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#ifdef __clang__
#define WIDE "avx2,avx512f,avx512bw,avx512vl,avx512dq"
#else
#define WIDE "avx2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"
#endif

__attribute__((target("avx2"))) static void step_avx2(void *c, int64_t first, int64_t last) { step_any(c, first, last); }
__attribute__((target("avx2"))) static void sum_avx2(void *c, int64_t first, int64_t last) { sum_parts_any(c, first, last); }
__attribute__((target(WIDE))) static void step_avx512(void *c, int64_t first, int64_t last) { step_any(c, first, last); }
__attribute__((target(WIDE))) static void sum_avx512(void *c, int64_t first, int64_t last) { sum_parts_any(c, first, last); }

/* 0 plain C, 1 AVX2, 2 AVX-512: the widest of this processor that is not wider than `level`, where that is not negative. */
static int widest(int level) {
    int has = !__builtin_cpu_supports("avx2")                                                   ? 0
              : __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")  ? 2
                                                                                                : 1;
    return level >= 0 && level < has ? level : has;
}

static const graft_work steps[] = {step_plain, step_avx2, step_avx512}, sums[] = {sum_plain, sum_avx2, sum_avx512};

#else

static int widest(int level) { return (void)level, 0; }
static const graft_work steps[] = {step_plain}, sums[] = {sum_plain};

#endif

/* One step over `count` values; `level` as above, negative for the widest. */
EXPORT void graft_adamw(const struct graft_adamw *step, int level, int threads) {
    graft_parallel((step->count + VALUES - 1) / VALUES, GRAIN, threads, steps[widest(level)], (void *)step);
}

/* How many float64 `graft_sum_of_squares` needs as room. */
EXPORT int64_t graft_sum_parts(int64_t count) { return (count + PART - 1) / PART; }

/* The sum of all squares of `count` values, float32 or bfloat16, in an order that does not depend on the threads. */
EXPORT double graft_sum_of_squares(const void *values, int type, int64_t count, double *parts, int level, int threads) {
    struct sum_job job = {values, parts, count, type, level};
    int64_t pieces = graft_sum_parts(count);
    graft_parallel(pieces, 1, threads, sums[widest(level)], &job);
    double total = 0;
    for (int64_t i = 0; i < pieces; i++) total += parts[i];
    return total;
}
