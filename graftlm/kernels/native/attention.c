/* Attention within the segments of a packed row, forward and backward, float32.
 *
 * PyTorch's fused attention takes one length at a time, so a packed row of examples of many lengths is many calls, with copies
 * between. Here each segment and head is one piece of work, whatever the lengths, and shared key-value heads are read as
 * they are. Probabilities are not saved: the backward pass recomputes them from the sums (Dao et al. 2022).
 * Every piece is done by one thread in one order, so results do not depend on the number of threads.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels.h"

typedef void (*attention_part)(const struct graft_attention_call *p, int64_t start, int64_t length, int64_t head, float *memory);

/* ---- four lanes: what every compiler makes something good of, NEON included ---- */

#define NAME(x) plain_##x
#define TARGET
#define LANES 4
#define CHUNK 8
#define KEYS 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define ALL(x) ((VEC){x, x, x, x})
#define LARGER(a, b) plain_larger(a, b)
typedef float four __attribute__((vector_size(16)));
INLINE four plain_larger(four a, four b) {
    typedef int32_t ints __attribute__((vector_size(16)));
    ints above = a > b;
    return (four)(((ints)a & above) | ((ints)b & ~above));
}
#include "attention.inc"
#undef NAME
#undef TARGET
#undef LANES
#undef CHUNK
#undef KEYS
#undef FMA
#undef ALL
#undef LARGER

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define CHUNK 8
#define KEYS 8
#define FMA(a, b, c) ((VEC)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define ALL(x) ((VEC)_mm256_set1_ps(x))
#define LARGER(a, b) ((VEC)_mm256_max_ps((__m256)(a), (__m256)(b)))
#include "attention.inc"
#undef NAME
#undef TARGET
#undef LANES
#undef CHUNK
#undef KEYS
#undef FMA
#undef ALL
#undef LARGER

#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES 16
#define CHUNK 16
#define KEYS 8
#define FMA(a, b, c) ((VEC)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define ALL(x) ((VEC)_mm512_set1_ps(x))
#define LARGER(a, b) ((VEC)_mm512_max_ps((__m512)(a), (__m512)(b)))
#include "attention.inc"
#undef NAME
#undef TARGET
#undef LANES
#undef CHUNK
#undef KEYS
#undef FMA
#undef ALL
#undef LARGER

static const attention_part forwards[] = {plain_forward, avx2_forward, avx512_forward};
static const attention_part backwards[] = {plain_backward, avx2_backward, avx512_backward};
#else
static const attention_part forwards[] = {plain_forward, plain_forward, plain_forward};
static const attention_part backwards[] = {plain_backward, plain_backward, plain_backward};
#endif

static int chosen;

void graft_attention_choose(int choice) { chosen = choice; }

struct attention_job {
    const struct graft_attention_call *p;
    attention_part part;
    int64_t heads, share; /* share: values that one piece works in */
    atomic_int failed;
};

static void pieces(void *context, int64_t first, int64_t last) {
    struct attention_job *job = context;
    float *memory = malloc(sizeof(float) * (size_t)job->share);
    if (!memory) {
        atomic_store(&job->failed, 1);
        return;
    }
    for (int64_t i = first; i < last; i++) {
        int64_t segment = i / job->heads, start = job->p->ends[segment];
        job->part(job->p, start, job->p->ends[segment + 1] - start, i % job->heads, memory);
    }
    free(memory);
}

/* Fills `out` and `log_sums` from q, k and v, or with `back` dq, dk and dv from those, dout, out and log_sums; width is a
 * multiple of 16. 1 when there was no memory, else 0. */
EXPORT int graft_attention(const struct graft_attention_call *p, int back) {
    enum { MOST_LANES = 16 };
    int64_t longest = 0;
    for (int64_t i = 0; i < p->segments; i++)
        if (p->ends[i + 1] - p->ends[i] > longest) longest = p->ends[i + 1] - p->ends[i];
    struct attention_job job = {.p = p,
                                .part = (back ? backwards : forwards)[chosen],
                                .heads = back ? p->kv_heads : p->heads,
                                .share = (back ? 4 * p->width + 2 * longest : p->width + longest) * MOST_LANES};
    graft_parallel(p->segments * job.heads, 1, p->threads, pieces, &job);
    return atomic_load(&job.failed);
}
