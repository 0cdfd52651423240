/* The exponential of fused.inc over all of its range, in units of the last place: one line for each instruction set.
 *
 *     exp STEP      every STEP-th float from -0 down to -87
 */
#include <stdio.h>
#include <stdlib.h>

#include "fused.c"

#define WORST(name, LANES, TARGET)                                                                              \
    TARGET static double worst_##name(uint32_t step) {                                                          \
        double worst = 0;                                                                                       \
        for (uint32_t bits = 0x80000000; bits < 0xc2ae0000; bits += step * LANES) {                             \
            float x[LANES], y[LANES];                                                                           \
            for (uint32_t i = 0; i < LANES; i++) {                                                              \
                x[i] = float_of(bits + i * step);                                                               \
                if (!(x[i] >= -87.0f)) x[i] = -87.0f;                                                           \
            }                                                                                                   \
            name##_store(y, 0, FLOAT32, name##_exp(name##_load(x, 0, FLOAT32)));                                \
            for (int i = 0; i < LANES; i++) {                                                                   \
                double truth = exp((double)x[i]), unit = ldexp(1, ilogb(truth) - 23), off = fabs(y[i] - truth) / unit; \
                if (!(off <= worst)) worst = off;                                                               \
            }                                                                                                   \
        }                                                                                                       \
        return worst;                                                                                           \
    }

WORST(plain, 4, )
#if defined(__x86_64__)
WORST(avx2, 8, __attribute__((target("avx2,fma,f16c"))))
WORST(avx512, 16, __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

int main(int count, char **arguments) {
    uint32_t step = count > 1 ? (uint32_t)atoi(arguments[1]) : 64;
    printf("%.3f\n", worst_plain(step));
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) printf("%.3f\n", worst_avx2(step));
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) printf("%.3f\n", worst_avx512(step));
#endif
    return 0;
}
