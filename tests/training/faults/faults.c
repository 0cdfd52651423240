// Faults of a disk and of the power, below everything: preloaded in front of libc, it counts the calls that change files under
// one folder and makes chosen ones fail, or kills the process right before one.
//
//   faults(folder, mode, k)   0 count only; 1 every k-th write fails; 2 all writes from the k-th on fail (a full disk);
//                             3 killed before the k-th change of any kind
//   changes()                 how many changes (mode 3: of any kind, else writes, flushes, renames and new folders) there were
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static size_t length;
static int mode;
static long k, count;

void faults(const char *path, int how, long number) {
    snprintf(folder, sizeof folder, "%s", path);
    length = strlen(folder);
    mode = how;
    k = number;
    count = 0;
}
long changes(void) { return count; }

static int below(const char *path) {
    char full[8192];
    if (!length) return 0;
    if (path[0] != '/') {
        char here[4096];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(full, sizeof full, "%s/%s", here, path);
        path = full;
    }
    return !strncmp(path, folder, length);
}

static int below_fd(int fd) {
    char link[64], path[4096];
    if (!length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return below(path);
}

// Whether this change fails; removing is a change only to a killer, for a full disk lets files go.
static int strikes(int removes) {
    if (removes && mode != 3) return 0;
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (mode == 3 && now == k) kill(getpid(), SIGKILL);
    if ((mode == 1 && now % k == 0) || (mode == 2 && now >= k)) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t);
    return below_fd(fd) && strikes(0) ? -1 : real(fd, data, n);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    return below_fd(fd) && strikes(0) ? -1 : real(fd, parts, n);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return below_fd(fd) && strikes(0) ? -1 : real(fd, data, n, at);
}
int fsync(int fd) {
    REAL(int, fsync, int);
    return below_fd(fd) && strikes(0) ? -1 : real(fd);
}
int ftruncate64(int fd, off64_t n) {
    REAL(int, ftruncate64, int, off64_t);
    return below_fd(fd) && strikes(0) ? -1 : real(fd, n);
}
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return below(to) && strikes(0) ? -1 : real(from, to);
}
int mkdir(const char *path, mode_t bits) {
    REAL(int, mkdir, const char *, mode_t);
    return below(path) && strikes(0) ? -1 : real(path, bits);
}
int unlink(const char *path) {
    REAL(int, unlink, const char *);
    if (below(path)) strikes(1);
    return real(path);
}
int rmdir(const char *path) {
    REAL(int, rmdir, const char *);
    if (below(path)) strikes(1);
    return real(path);
}
int unlinkat(int at, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    if (path[0] == '/' ? below(path) : below_fd(at)) strikes(1);
    return real(at, path, flags);
}
