/* All layers of a decoder in one call: norms, matmuls with their adapters, rotary positions, attention over a paged KV cache.
 *
 * A step of decoding is some 300 short operations. Called one by one from Python each costs more than its work, and so does
 * waking threads for each. Here the threads are woken once and go through the layers together:
 *
 *     norm | q k v | turn and keep | attend | o | norm | gate up | act | down        phases of a layer
 *
 * The pieces of a phase are taken from a counter, and a phase is over when all of its pieces are done. So nobody waits for a
 * thread that has no piece in hand: one that starts late, or never, holds up no other.
 *
 * A matmul and the adapters' low-rank terms of the same input are pieces of one phase and have outputs of their own (y, z);
 * whoever reads the result adds them. Every row is summed in an order of its own, so its bits do not depend on the other
 * rows; with one exception, NF4 weights, where more than MAX_ROWS rows make a tile dense once instead of decoding in registers.
 *
 * Letters: T rows (tokens of any sequences), width, inner, H heads, K key heads, D their width.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels.h"
#include "layers.h"

enum { PHASES = 9, TILE = 32, TILE_VALUES = 1 << 14, COLUMNS = 1024, ROWS_A_TILE = 64, MOST_RANK = 256, MOST_TOGETHER = 3 };
/* TILE: most outputs of a piece. COLUMNS: inputs at once, in whole NF4 blocks. ROWS_A_TILE: rows that a dense tile serves. */

enum kind { NORM, QKV, KEEP, ATTEND, OUT, NORM_AGAIN, GATE_UP, ACT, DOWN };

struct chunk { /* at most MAX_ROWS rows of one route */
    int64_t route, row;
    int rows;
};

struct phase {
    atomic_llong next, done;
    char apart[64 - 2 * sizeof(atomic_llong)]; /* a cache line of its own */
};

struct job {
    const struct stack *s;
    const struct pass *p;
    struct phase *phases;
    const struct chunk *chunks;
    const int64_t *route_of; /* (T,): -1 where a row uses the base alone */
    int64_t chunk_count, half;
    int splits;                /* NF4 weights meet x split into its even and odd values */
    float *even, *odd;         /* (T, half) */
    float *n;                  /* (T, width): what a norm gives */
    float *q, *k, *v, *a;      /* (T, H D), (T, K D) twice, (T, H D) */
    float *y, *gate, *up, *act; /* (T, width), (T, inner) thrice */
    float *zq, *zk, *zv, *zy, *zgate, *zup; /* the adapters' shares of q, k, v, y, gate, up */
};

/* ---- matmuls ---- */

struct product { /* the linear layers of one phase, which read the same x */
    const struct linear *linear[MOST_TOGETHER];
    float *y[MOST_TOGETHER], *z[MOST_TOGETHER];
    const float *x;
    int64_t in;
    int count;
};

static struct product product_of(const struct job *job, const struct layer *l, enum kind kind) {
    const struct stack *s = job->s;
    switch (kind) {
        case QKV:
            return (struct product){{&l->q, &l->k, &l->v}, {job->q, job->k, job->v}, {job->zq, job->zk, job->zv},
                                    job->n, s->width, 3};
        case OUT: return (struct product){{&l->o}, {job->y}, {job->zy}, job->a, s->heads * s->head_width, 1};
        case GATE_UP:
            return (struct product){{&l->gate, &l->up}, {job->gate, job->up}, {job->zgate, job->zup}, job->n, s->width, 2};
        default: return (struct product){{&l->down}, {job->y}, {job->zy}, job->act, s->inner, 1};
    }
}

static int64_t tile_of(int64_t in) {
    int64_t tile = TILE_VALUES / in / 8 * 8;
    return tile < 8 ? 8 : tile > TILE ? TILE : tile;
}

static int64_t tiles_of(const struct linear *linear, int64_t in) { return (linear->out + tile_of(in) - 1) / tile_of(in); }

static int64_t product_pieces(const struct job *job, const struct product *p) {
    int64_t pieces = p->count * job->chunk_count;
    for (int i = 0; i < p->count; i++) pieces += tiles_of(p->linear[i], p->in);
    return pieces;
}

/* W[first .. first + outs, column .. column + n] in float32 or bfloat16: where it lies, or made dense in `wide`. */
static const void *tile_values(const struct graft_matrix *w, int64_t first, int64_t outs, int64_t column, int64_t n,
                               float *wide, int64_t *stride, int *type) {
    *stride = w->row;
    *type = w->kind == GRAFT_BFLOAT16 ? BFLOAT16 : FLOAT32;
    int64_t at = first * w->row + column;
    if (w->kind == GRAFT_FLOAT32 || w->kind == GRAFT_BFLOAT16) return (const char *)w->values + at * float_bytes(*type);
    *stride = n;
    for (int64_t o = 0; o < outs; o++) {
        int64_t from = at + o * w->row;
        if (w->kind == GRAFT_NF4)
            graft_nf4_range(w->values, w->absmax, w->scale, *w->offset, w->start + from, w->start + from + n, wide + o * n);
        else
            graft_int8_range((const int8_t *)w->values + from, w->scale[first + o], n, wide + o * n);
    }
    return wide;
}

static void tile_piece(const struct job *job, const struct product *p, int which, int64_t tile) {
    const struct linear *linear = p->linear[which];
    const int64_t first = tile * tile_of(p->in), rest = linear->out - first, T = job->p->rows;
    const int64_t outs = rest < tile_of(p->in) ? rest : tile_of(p->in);
    float *y = p->y[which];
    if (job->splits && linear->weight.kind == GRAFT_NF4) {
        graft_nf4_outputs(&linear->weight, first, first + outs, p->x, p->in, (int)T, job->even, job->odd, job->half, y,
                          linear->out);
    } else if (linear->weight.kind >= GRAFT_Q4_0) {
        graft_block_outputs(&linear->weight, first, first + outs, p->x, p->in, T, y, linear->out);
    } else {
        float wide[TILE * COLUMNS];
        for (int64_t row = 0; row < T; row += ROWS_A_TILE) {
            const int64_t here = T - row < ROWS_A_TILE ? T - row : ROWS_A_TILE;
            float sums[ROWS_A_TILE / MAX_ROWS][TILE * MAX_ROWS];
            memset(sums, 0, sizeof sums[0] * (size_t)((here + MAX_ROWS - 1) / MAX_ROWS));
            for (int64_t column = 0; column < p->in; column += COLUMNS) {
                int64_t n = p->in - column < COLUMNS ? p->in - column : COLUMNS, stride;
                int type;
                const void *w = tile_values(&linear->weight, first, outs, column, n, wide, &stride, &type);
                for (int64_t k = 0; k < here; k += MAX_ROWS)
                    use_rows->dots(w, stride, type, n, (int)outs, p->x + (row + k) * p->in + column, p->in,
                                   (int)(here - k < MAX_ROWS ? here - k : MAX_ROWS), sums[k / MAX_ROWS]);
            }
            for (int64_t k = 0; k < here; k++)
                for (int64_t o = 0; o < outs; o++)
                    y[(row + k) * linear->out + first + o] = sums[k / MAX_ROWS][o * MAX_ROWS + k % MAX_ROWS];
        }
    }
    if (linear->bias)
        for (int64_t k = 0; k < T; k++)
            for (int64_t o = first; o < first + outs; o++) y[k * linear->out + o] += linear->bias[o];
}

/* z = s (x A^T) B of one adapter's rows. */
static void adapter_piece(const struct job *job, const struct product *p, int which, const struct chunk *chunk) {
    const struct linear *linear = p->linear[which];
    const struct factors *f = job->p->factors[chunk->route][linear->number];
    if (!f) return;
    const float *x = p->x + chunk->row * p->in;
    float h[MAX_ROWS * MOST_RANK], *z = p->z[which] + chunk->row * linear->out;
    for (int64_t j = 0; j < f->rank; j += TILE) {
        int outs = (int)(f->rank - j < TILE ? f->rank - j : TILE);
        float sums[TILE * MAX_ROWS] = {0};
        use_rows->dots((const char *)f->A + j * p->in * float_bytes((int)f->a_type), p->in, (int)f->a_type, p->in, outs, x,
                       p->in, chunk->rows, sums);
        for (int k = 0; k < chunk->rows; k++)
            for (int o = 0; o < outs; o++) h[k * f->rank + j + o] = sums[o * MAX_ROWS + k] * (float)f->scale;
    }
    memset(z, 0, sizeof(float) * (size_t)(chunk->rows * linear->out));
    use_rows->spread(f->B, (int)f->b_type, f->rank, linear->out, h, chunk->rows, z, linear->out);
}

/* Pieces of both kinds in turn, beginning with an adapter's: those wait for memory while tiles of W keep a core busy. */
static void product_piece(const struct job *job, const struct product *p, int64_t piece, int64_t pieces) {
    const int64_t shares = p->count * job->chunk_count;
    const int64_t before = (piece * shares + pieces - 1) / pieces, after = ((piece + 1) * shares + pieces - 1) / pieces;
    if (after > before) {
        adapter_piece(job, p, (int)(before % p->count), job->chunks + before / p->count);
        return;
    }
    piece -= before;
    int which = 0;
    while (piece >= tiles_of(p->linear[which], p->in)) piece -= tiles_of(p->linear[which++], p->in);
    tile_piece(job, p, which, piece);
}

/* to (n,) += z's row, where its adapter has a share in the linear layer. */
static void add_share(const struct job *job, const struct linear *linear, int64_t row, const float *z, float *to) {
    int64_t route = job->route_of[row];
    if (route < 0 || !job->p->factors[route][linear->number]) return;
    for (int64_t i = 0; i < linear->out; i++) to[i] += z[row * linear->out + i];
}

/* ---- between the matmuls, row by row ---- */

/* Split values first .. first + n of a row for NF4; `first` is even. */
static void split(const struct job *job, int64_t row, const float *from, int64_t first, int64_t n) {
    if (!job->splits) return;
    float *even = job->even + row * job->half + first / 2, *odd = job->odd + row * job->half + first / 2;
    for (int64_t j = 0; j < n / 2; j++) even[j] = from[first + 2 * j], odd[j] = from[first + 2 * j + 1];
    if (n % 2) even[n / 2] = from[first + n - 1];
}

/* Residual stream: add the last matmul's output, and apply the next norm. */
static void norm_row(const struct job *job, int64_t row, const struct linear *before, const float *weight, float *to) {
    const struct stack *s = job->s;
    float *x = job->p->x + row * s->width;
    if (before) {
        float *y = job->y + row * s->width;
        add_share(job, before, row, job->zy, y);
        for (int64_t i = 0; i < s->width; i++) x[i] += y[i];
    }
    graft_norm_row(x, weight, (float)s->offset, (float)s->epsilon, s->width, to);
    if (to != x) split(job, row, to, 0, s->width);
}

static void turn_heads(const struct stack *s, int64_t position, const float *norm, int64_t heads, float *x) {
    for (int64_t h = 0; h < heads; h++) {
        float *head = x + h * s->head_width;
        if (norm) graft_norm_row(head, norm, (float)s->offset, (float)s->epsilon, s->head_width, head);
        graft_rotate_head(head, s->cosine + position * s->turned, s->sine + position * s->turned, s->turned);
    }
}

static void keep_row(const struct job *job, const struct layer *l, int64_t row) {
    const struct stack *s = job->s;
    const struct pass *p = job->p;
    const int64_t size = s->key_heads * s->head_width, position = p->position[row];
    const int64_t at = p->table[row * p->table_stride + position / s->block] * s->block + position % s->block;
    float *q = job->q + row * s->heads * s->head_width, *k = job->k + row * size, *v = job->v + row * size;
    add_share(job, &l->q, row, job->zq, q);
    add_share(job, &l->k, row, job->zk, k);
    add_share(job, &l->v, row, job->zv, v);
    turn_heads(s, position, l->query_norm, s->heads, q);
    turn_heads(s, position, l->key_norm, s->key_heads, k);
    memcpy(l->keys + at * size, k, sizeof(float) * (size_t)size);
    memcpy(l->values + at * size, v, sizeof(float) * (size_t)size);
}

static void attend_piece(const struct job *job, const struct layer *l, int64_t piece) {
    enum { MOST_BLOCK = 64 };
    const struct stack *s = job->s;
    const struct pass *p = job->p;
    int64_t row = piece / s->key_heads, head = piece % s->key_heads, groups = s->heads / s->key_heads;
    float scratch[2 * MAX_ROWS * MOST_BLOCK], *out = job->a + row * s->heads * s->head_width;
    struct attention a = {.block = s->block, .heads = s->heads, .key_heads = s->key_heads, .width = s->head_width,
                          .value_width = s->head_width, .query_head = s->head_width, .scale = l->scale,
                          .softcap = l->softcap, .window = l->window};
    graft_attend_one(&a, head, p->position[row] + 1, p->table + row * p->table_stride, job->q + row * s->heads * s->head_width,
                     l->keys, l->values, out, scratch);
    split(job, row, out, head * groups * s->head_width, groups * s->head_width);
}

static void act_row(const struct job *job, const struct layer *l, int64_t row) {
    const int64_t n = job->s->inner;
    add_share(job, &l->gate, row, job->zgate, job->gate + row * n);
    add_share(job, &l->up, row, job->zup, job->up + row * n);
    graft_gate_row(job->gate + row * n, job->up + row * n, n, job->act + row * n, (int)job->s->gelu);
    split(job, row, job->act + row * n, 0, n);
}

/* ---- phases ---- */

static int64_t pieces_of(const struct job *job, const struct product *product, enum kind kind) {
    switch (kind) {
        case QKV: case OUT: case GATE_UP: case DOWN: return product_pieces(job, product);
        case ATTEND: return job->p->rows * job->s->key_heads;
        default: return job->p->rows;
    }
}

static void one_piece(const struct job *job, int64_t number, const struct product *product, enum kind kind, int64_t piece,
                      int64_t pieces) {
    const struct layer *l = job->s->layer + number;
    switch (kind) {
        case NORM: norm_row(job, piece, number ? &l[-1].down : NULL, l->norm, job->n + piece * job->s->width); break;
        case KEEP: keep_row(job, l, piece); break;
        case ATTEND: attend_piece(job, l, piece); break;
        case NORM_AGAIN: norm_row(job, piece, &l->o, l->norm_again, job->n + piece * job->s->width); break;
        case ACT: act_row(job, l, piece); break;
        default: product_piece(job, product, piece, pieces);
    }
}

static void rest_a_moment(int turns) {
    if (turns > 2000) { /* whoever holds the piece may have lost its core */
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_for(struct phase *phase, int64_t pieces) {
    for (int turns = 0; atomic_load_explicit(&phase->done, memory_order_acquire) < pieces; turns += turns < 1 << 20)
        rest_a_moment(turns);
}

/* What every thread does: all layers, phase by phase. */
static void go_through(void *context, int64_t first, int64_t last) {
    const struct job *job = context;
    const struct stack *s = job->s;
    (void)first, (void)last;
    struct phase *phase = job->phases;
    for (int64_t number = 0; number < s->layers; number++)
        for (int kind = NORM; kind <= DOWN; kind++, phase++) {
            const struct product product = product_of(job, s->layer + number, (enum kind)kind);
            const int64_t pieces = pieces_of(job, &product, (enum kind)kind);
            int64_t piece;
            while ((piece = atomic_fetch_add_explicit(&phase->next, 1, memory_order_relaxed)) < pieces) {
                one_piece(job, number, &product, (enum kind)kind, piece, pieces);
                atomic_fetch_add_explicit(&phase->done, 1, memory_order_release);
            }
            wait_for(phase, pieces);
        }
    int64_t row;
    while ((row = atomic_fetch_add_explicit(&phase->next, 1, memory_order_relaxed)) < job->p->rows) {
        norm_row(job, row, &s->layer[s->layers - 1].down, s->last_norm, job->p->x + row * s->width);
        atomic_fetch_add_explicit(&phase->done, 1, memory_order_release);
    }
    wait_for(phase, job->p->rows);
}

/* ---- one call ---- */

static int any_nf4(const struct stack *s) {
    for (const struct layer *l = s->layer; l < s->layer + s->layers; l++) {
        const struct linear *of[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (int i = 0; i < 7; i++)
            if (of[i]->weight.kind == GRAFT_NF4) return 1;
    }
    return 0;
}

static int64_t widest(const struct stack *s) {
    int64_t most = s->width > s->inner ? s->width : s->inner;
    return most > s->heads * s->head_width ? most : s->heads * s->head_width;
}

/* x -> the states behind the last norm; keys and values of all rows are kept. 1 when there was no memory, else 0. */
EXPORT int graft_layers(const struct stack *s, const struct pass *p) {
    const int64_t T = p->rows, queries = s->heads * s->head_width, keys = s->key_heads * s->head_width;
    const int splits = T <= MAX_ROWS && any_nf4(s);
    const int64_t half = splits ? graft_half(widest(s)) : 0;
    const int64_t floats = T * (2 * half + 3 * s->width + 3 * queries + 4 * keys + 5 * s->inner);
    float *memory = malloc(sizeof(float) * (size_t)floats);
    struct phase *phases = calloc((size_t)(s->layers * PHASES + 1), sizeof(struct phase));
    struct chunk *chunks = malloc(sizeof(struct chunk) * (size_t)T);
    int64_t *route_of = malloc(sizeof(int64_t) * (size_t)T), count = 0;
    const int good = memory && phases && chunks && route_of;
    if (good) {
        for (int64_t row = 0; row < T; row++) route_of[row] = -1;
        for (int64_t route = 0; route < p->routes; route++) {
            int64_t first = p->ranges[2 * route], last = p->ranges[2 * route + 1];
            for (int64_t row = first; row < last; row++) route_of[row] = route;
            for (int64_t row = first; row < last; row += MAX_ROWS)
                chunks[count++] = (struct chunk){route, row, (int)(last - row < MAX_ROWS ? last - row : MAX_ROWS)};
        }
        struct job job = {.s = s, .p = p, .phases = phases, .chunks = chunks, .route_of = route_of, .chunk_count = count,
                          .half = half, .splits = splits};
        float *at = memory;
        const struct { float **to; int64_t size; } parts[] = {
            {&job.even, half}, {&job.odd, half}, {&job.n, s->width}, {&job.y, s->width}, {&job.zy, s->width},
            {&job.q, queries}, {&job.zq, queries}, {&job.a, queries}, {&job.k, keys}, {&job.zk, keys}, {&job.v, keys},
            {&job.zv, keys}, {&job.gate, s->inner}, {&job.zgate, s->inner}, {&job.up, s->inner}, {&job.zup, s->inner},
            {&job.act, s->inner},
        };
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) *parts[i].to = at, at += T * parts[i].size;
        graft_parallel(p->threads, 1, (int)p->threads, go_through, &job);
    }
    free(route_of), free(chunks), free(phases), free(memory);
    return !good;
}
