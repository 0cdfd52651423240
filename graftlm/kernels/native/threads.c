/* Sharing work between threads, without a second pool beside PyTorch's.
 *
 * PyTorch keeps an OpenMP team whose idle threads spin for a while; a second team would fight them for the cores. So we
 * borrow that team: Python hands us the address of `GOMP_parallel` from the OpenMP library PyTorch has already loaded.
 * Where it has none, threads are started for the call (some 20 microseconds each). Pieces of work are taken from one
 * counter, so a thread that is held up by something else does not hold up the others.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "kernels.h"

typedef void (*openmp_parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static openmp_parallel borrowed;

void graft_borrow_openmp(void *gomp_parallel) { borrowed = (openmp_parallel)gomp_parallel; }

struct job {
    graft_work work;
    void *context;
    int64_t count, grain;
    atomic_llong next;
};

static void take_pieces(void *data) {
    struct job *job = data;
    for (;;) {
        int64_t first = atomic_fetch_add_explicit(&job->next, job->grain, memory_order_relaxed);
        if (first >= job->count) return;
        int64_t last = first + job->grain;
        job->work(job->context, first, last < job->count ? last : job->count);
    }
}

static void *thread_main(void *data) {
    take_pieces(data);
    return NULL;
}

void graft_parallel(int64_t count, int64_t grain, int threads, graft_work work, void *context) {
    enum { MOST = 256 };
    struct job job = {work, context, count, grain, 0};
    int64_t pieces = (count + grain - 1) / grain;
    if (threads > pieces) threads = (int)pieces;
    if (threads > MOST) threads = MOST;
    if (threads <= 1) {
        if (count > 0) work(context, 0, count);
        return;
    }
    if (borrowed) {
        borrowed(take_pieces, &job, (unsigned)threads, 0);
        return;
    }
    pthread_t started[MOST];
    int running = 0;
    for (int i = 1; i < threads; i++)
        if (pthread_create(&started[running], NULL, thread_main, &job) == 0) running++;
    take_pieces(&job);
    for (int i = 0; i < running; i++) pthread_join(started[i], NULL);
}
