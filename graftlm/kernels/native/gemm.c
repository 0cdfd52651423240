/* Our own matmul, for processors that are not Intel's: there MKL leaves half of AVX-512 idle (measured on an EPYC
 * of 2024: 107 of 263 GFLOP/s a core; ours 215), and with AVX2, where it is as fast as ours, it cannot do the following.
 *
 *     C (M, N) [+]= alpha * sum over terms of A (M, K) B (K, N)          all in float32
 *
 * B may be a stored weight, in either orientation: it is decoded while it is packed, so a matmul with 4-bit codes costs
 * what a dense one does. A second term with its own K adds an adapter's low-rank term in the same loop over C.
 *
 * The shape of it is that of Goto and van de Geijn (2008): K is cut into pieces of at most MOST_K; of B a piece is packed
 * in panels as wide as a tile, of A in panels as high as one that stay in the second-level cache, and a kernel keeps a tile's
 * sums in registers. `gemm_avx2.c` and `gemm_avx512.c` fill panels and multiply tiles. A that would be used for two panels of B
 * only is read where it lies, and so is B for a few rows of A; for more it is packed, since its rows lie far apart and would
 * push each other out of the first cache. Every element of C is summed in the same order whatever the number of threads.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* madvise */
#endif
#include <stdatomic.h>
#include <stdlib.h>

#include "gemm.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

static _Atomic(const struct gemm_set *) chosen; /* by `graft_gemm_choose`; the widest where nobody has */

/* ---- memory that outlives a call, so that its pages are there already ---- */

struct workspace {
    float *a;    /* at most MOST_M x MOST_K */
    float *b;    /* MOST_N x MOST_K, and what lies between its panels */
    float *rows; /* decoded rows of a stored weight: MOST_N values, or WIDEST x MOST_K */
};

enum { MOST_M = 480, WORKSPACES = 256, A_VALUES = MOST_M * MOST_K, B_VALUES = MOST_N * (MOST_K + GAP), ROW_VALUES = WIDEST * MOST_K };
static _Atomic(void *) idle[WORKSPACES];

static float *borrow(void) {
    for (int i = 0; i < WORKSPACES; i++) {
        void *found = atomic_exchange(&idle[i], NULL);
        if (found) return found;
    }
    const size_t page = 1 << 21, bytes = sizeof(float) * (A_VALUES + B_VALUES + ROW_VALUES);
    void *made = aligned_alloc(page, (bytes + page - 1) / page * page);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (made) madvise(made, bytes, MADV_HUGEPAGE);
#endif
    return made;
}

static void give_back(float *memory) {
    for (int i = 0; i < WORKSPACES; i++) {
        void *empty = NULL;
        if (atomic_compare_exchange_strong(&idle[i], &empty, memory)) return;
    }
    free(memory);
}

void graft_gemm_decode(const struct graft_matrix *w, int64_t row, int64_t first, int64_t count, float *to) {
    int64_t at = w->start + row * w->row + first;
    if (w->kind == GRAFT_NF4) {
        graft_nf4_range(w->values, w->absmax, w->scale, *w->offset, at, at + count, to);
    } else if (w->kind == GRAFT_INT8) {
        graft_int8_range((const int8_t *)w->values + at, w->scale[row], count, to);
    } else if (w->kind >= GRAFT_Q4_0) {
        graft_block_range(w, row, first, count, to);
    } else { /* bfloat16 */
        const uint16_t *from = (const uint16_t *)w->values + at;
        for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)from[i] << 16);
    }
}

/* ---- the matmul ---- */

struct product {
    const struct gemm_set *set;
    const struct graft_matrix *a, *b;
    const int64_t *k;
    int terms;
    int64_t m, n;
    float *c;
    int64_t c_row;
    float alpha;
    int add;
    int64_t m_step, n_step; /* what one piece covers */
    int64_t n_pieces;
    int64_t span; /* pieces of N begin at multiples of it */
    atomic_int failed;
};

static int64_t even_step(int64_t length, int64_t most, int64_t unit) { /* equal steps of at most `most`, in units */
    int64_t steps = (length + most - 1) / most;
    if (steps < 1) steps = 1;
    int64_t step = (length + steps - 1) / steps;
    return (step + unit - 1) / unit * unit;
}

static int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

/* B[k0 .. k0 + count, n0 .. n0 + columns] into panels; a weight is B itself when `along`, else B is the weight turned. */
static void pack_b(const struct gemm_set *set, const struct graft_matrix *b, int64_t k0, int64_t count, int64_t n0,
                   int64_t columns, float *to, float *scratch) {
    const float *dense = (const float *)b->values + b->start;
    const int width = set->columns;
    if (b->along) {
        for (int64_t k = 0; k < count; k++) {
            const float *row = dense + (k0 + k) * b->row + n0;
            if (b->kind != GRAFT_FLOAT32) graft_gemm_decode(b, k0 + k, n0, columns, scratch), row = scratch;
            set->cut(row, columns, k, count, to);
        }
        return;
    }
    for (int64_t n = 0; n < columns; n += width) {
        const int here = least(width, columns - n);
        const float *first = dense + (n0 + n) * b->row + k0;
        int64_t stride = b->row;
        if (b->kind != GRAFT_FLOAT32) {
            for (int i = 0; i < here; i++) graft_gemm_decode(b, n0 + n + i, k0, count, scratch + i * MOST_K);
            first = scratch, stride = MOST_K;
        }
        set->turn_columns(first, stride, here, count, to + panel_of(n, width, count));
    }
}

/* A[m0 .. m0 + rows, k0 .. k0 + count] into panels; A's rows are k when `along`, as for B. */
static void pack_a(const struct gemm_set *set, const struct graft_matrix *a, int64_t m0, int64_t rows, int64_t k0,
                   int64_t count, float *to) {
    const float *values = (const float *)a->values + a->start;
    for (int64_t m = 0; m < rows; m += set->rows) {
        const int here = least(set->rows, rows - m);
        if (a->along)
            set->copy_rows(values + k0 * a->row + m0 + m, a->row, here, count, to + m * count);
        else
            set->turn_rows(values + (m0 + m) * a->row + k0, a->row, here, count, to + m * count);
    }
}

static void rectangle(const struct product *p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float *memory) {
    float *packed_a = memory, *packed_b = memory + A_VALUES, *scratch = memory + A_VALUES + B_VALUES;
    const struct gemm_set *set = p->set;
    const int mr = set->rows, nr = set->columns;
    const int64_t m_step = even_step(m1 - m0, set->most_m, mr), n_step = even_step(n1 - n0, MOST_N, p->span);
    for (int64_t n = n0; n < n1; n += n_step) {
        const int64_t columns = least(n_step, n1 - n);
        int add = p->add;
        for (int term = 0; term < p->terms; term++) {
            const struct graft_matrix *a = p->a + term, *b = p->b + term;
            /* bfloat16 for any share and number of rows: a row's result does not depend on the others.
             * Packing pays where what is packed is read often enough. */
            const int narrow = b->narrow && set->narrow_pack_b && p->n > 2 * nr;
            const int loose_a = !narrow && columns <= 2 * nr;
            const int loose_b = !narrow && b->kind == GRAFT_FLOAT32 && b->along && m1 - m0 <= 4;
            const int64_t k_step = even_step(p->k[term], MOST_K, SPAN);
            for (int64_t k = 0; k < p->k[term]; k += k_step) {
                const int64_t count = least(k_step, p->k[term] - k);
                const int64_t words = narrow ? (count + 1) / 2 : count;
                if (narrow)
                    set->narrow_pack_b(b, k, count, n, columns, packed_b, scratch);
                else if (!loose_b)
                    pack_b(set, b, k, count, n, columns, packed_b, scratch);
                for (int64_t m = m0; m < m1; m += m_step) {
                    const int64_t rows = least(m_step, m1 - m);
                    if (narrow)
                        set->narrow_pack_a(a, m, rows, k, count, packed_a, scratch);
                    else if (!loose_a)
                        pack_a(set, a, m, rows, k, count, packed_a);
                    for (int64_t j = 0; j < columns; j += nr)
                        for (int64_t i = 0; i < rows; i += mr) {
                            const float *from = (const float *)a->values + a->start;
                            struct tile t = {.count = words, .c = p->c + (m + i) * p->c_row + n + j, .c_row = p->c_row,
                                             .alpha = p->alpha, .add = add};
                            if (!loose_a) {
                                t.a = packed_a + i * words, t.a_row = 1, t.a_column = mr;
                            } else if (a->along) {
                                t.a = from + k * a->row + m + i, t.a_row = 1, t.a_column = a->row;
                            } else {
                                t.a = from + (m + i) * a->row + k, t.a_row = a->row, t.a_column = 1;
                            }
                            if (loose_b) {
                                t.b = (const float *)b->values + b->start + k * b->row + n + j, t.b_row = b->row;
                            } else {
                                t.b = packed_b + panel_of(j, nr, words), t.b_row = nr;
                            }
                            set->multiply(&t, least(mr, rows - i), least(nr, columns - j), !loose_a && !loose_b, narrow);
                        }
                }
                add = 1;
            }
        }
    }
}

static void piece(void *context, int64_t first, int64_t last) {
    struct product *p = context;
    float *memory = borrow();
    if (!memory) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (int64_t i = first; i < last; i++) {
        int64_t m0 = i / p->n_pieces * p->m_step, n0 = i % p->n_pieces * p->n_step;
        int64_t m1 = m0 + p->m_step < p->m ? m0 + p->m_step : p->m, n1 = n0 + p->n_step < p->n ? n0 + p->n_step : p->n;
        if (m0 < m1 && n0 < n1) rectangle(p, m0, m1, n0, n1, memory);
    }
    give_back(memory);
}

/* Use AVX2 (1) or AVX-512 (2); -1 for the widest there is. Returns which one is used; 0 for none. */
EXPORT int graft_gemm_choose(int choice) {
    const struct gemm_set *found = choice == 1 || choice == 0 ? NULL : graft_gemm_avx512();
    int which = found ? 2 : 0;
    if (!found && choice != 2 && choice != 0 && (found = graft_gemm_avx2())) which = 1;
    atomic_store(&chosen, found);
    return which;
}

static const struct gemm_set *the_set(void) {
    const struct gemm_set *found = atomic_load(&chosen);
    if (!found && graft_gemm_choose(-1)) found = atomic_load(&chosen);
    return found;
}

/* What this processor has: AVX-512 (1), AVX-512 that PyTorch's library is known not to use all of (2), AVX2 of which that is
 * so (3), or none of these (0). */
EXPORT int graft_gemm_level(void) {
    const struct gemm_set *widest = graft_gemm_avx512();
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    const int theirs = __builtin_cpu_is("intel");
#else
    const int theirs = 0;
#endif
    if (widest) return theirs ? 1 : 2;
    return graft_gemm_avx2() && !theirs ? 3 : 0;
}

/* Whether it multiplies bfloat16 words. */
EXPORT int graft_gemm_narrow(void) {
    const struct gemm_set *found = the_set();
    return found && found->narrow_pack_b;
}

/* C (m, n), rows `c_row` apart: = or, with `add`, += alpha * sum over terms of A_t (m, k_t) B_t (k_t, n). 1 without memory, else 0. */
EXPORT int graft_gemm(int64_t m, int64_t n, const int64_t *k, int terms, const struct graft_matrix *a,
                      const struct graft_matrix *b, float *c, int64_t c_row, float alpha, int add, int threads) {
    const struct gemm_set *set = the_set();
    if (!set) return 1;
    if (m <= 0 || n <= 0) return 0;
    struct product p = {.set = set, .a = a, .b = b, .k = k, .terms = terms, .m = m, .n = n, .c = c, .c_row = c_row, .alpha = alpha, .add = add, .span = SPAN};
    int64_t all = 0;
    for (int i = 0; i < terms; i++) all += k[i];
    double work = (double)m * (double)n * (double)all;
    if (work < 2e5) threads = 1;
    if (threads < 1) threads = 1;
    /* One piece a thread, along the side that leaves less to pack: what the other side packs, each thread packs for itself, and
     * A for each MOST_N columns. Where rows of 4-bit codes are cut, it is between blocks. */
    int unit = set->columns;
    for (int i = 0; i < terms; i++) {
        if (b[i].kind >= GRAFT_Q4_K && b[i].along) p.span = graft_block_length(b[i].kind);
        if ((b[i].kind == GRAFT_NF4 || b[i].kind >= GRAFT_Q4_0) && b[i].along && n >= threads * p.span) unit = (int)p.span;
    }
    const double share = (double)((n + threads - 1) / threads);
    const double along_n = (double)m * threads * (double)(int64_t)((share + MOST_N - 1) / MOST_N) + (double)n;
    const double along_m = (double)m * (double)((n + MOST_N - 1) / MOST_N) + (double)n * threads;
    if (n >= threads * unit && (m < threads * set->rows || along_n <= along_m)) {
        p.n_step = even_step(n, (n + threads - 1) / threads, unit), p.m_step = m;
    } else {
        p.m_step = even_step(m, (m + threads - 1) / threads, set->rows), p.n_step = n;
    }
    p.n_pieces = (n + p.n_step - 1) / p.n_step;
    int64_t pieces = p.n_pieces * ((m + p.m_step - 1) / p.m_step);
    graft_parallel(pieces, 1, threads, piece, &p);
    return atomic_load(&p.failed);
}
