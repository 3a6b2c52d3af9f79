/* Loaded before libc (LD_PRELOAD): counts the calls that change files below a folder, and makes one of them fail, or
   kills the process there. Python, Rust (safetensors, tokenizers) and C++ (torch) all come through these functions. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 16
enum { OPENS = 1, NAMES = 2, REMOVES = 4, BYTES = 8 }; /* What a call does; an errno is possible for some of them. */

struct slot {
    atomic_long count;   /* calls so far */
    atomic_long hits;    /* of those, how many were made to fail */
    char where[PATH_MAX + 64]; /* the first of them: its function and path */
};

static struct slot *slots; /* shared by a process and those that it forks */
static struct slot *mine;
static char folder[PATH_MAX];
static int fails_with, kinds, once, trace = -1;
static long fails_at, delay;

__attribute__((constructor)) static void begin(void) {
    slots = mmap(NULL, SLOTS * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* From now on, this process's call number `at` (the first is 1) of these kinds below the folder fails with an errno, and
   so do those after it unless it is to be once. Without an errno the process is killed there, or so many microseconds
   after. 0 as number only counts. */
void faults_arm(int slot, const char *below, int error, int of_kinds, long at, int only_once, long microseconds) {
    snprintf(folder, sizeof folder, "%s", below);
    fails_with = error, kinds = of_kinds, fails_at = at, once = only_once, delay = microseconds;
    mine = slots + slot;
}
void faults_trace(int fd) { trace = fd; } /* gets a line for every call */
void faults_clear(int slot) { memset(slots + slot, 0, sizeof *slots); }
long faults_count(int slot) { return slots[slot].count; }
long faults_hits(int slot) { return slots[slot].hits; }
const char *faults_where(int slot) { return slots[slot].where; }

static int is_below(const char *path) {
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || path[length] == 0);
}

static ssize_t path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length;
}

static int kill_later(void) {
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
    struct itimerspec time = {.it_value = {delay / 1000000, delay % 1000000 * 1000}};
    timer_t timer;
    timer_create(CLOCK_MONOTONIC, &event, &timer);
    timer_settime(timer, 0, &time, NULL);
    return 0;
}

/* Whether this call is to fail; errno is set then. */
static int fails(const char *function, int kind, const char *path) {
    if (!mine || !(kind & kinds) || !is_below(path)) return 0;
    long number = atomic_fetch_add(&mine->count, 1) + 1;
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%d %s %s\n", kind, function, path);
        syscall(SYS_write, trace, line, length);
    }
    if (!fails_at || number < fails_at || (once && number > fails_at)) return 0;
    if (!atomic_fetch_add(&mine->hits, 1)) snprintf(mine->where, sizeof mine->where, "%s %s", function, path);
    if (fails_with) errno = fails_with;
    else if (delay) return number == fails_at ? kill_later() : 0;
    return 1;
}

static int die_or_fail(void) {
    if (!fails_with) kill(getpid(), SIGKILL);
    return -1;
}

static int fails_at_path(const char *function, int kind, int dir, const char *path) {
    if (!mine) return 0;
    char whole[PATH_MAX * 2];
    ssize_t length = 0;
    if (path[0] != '/') {
        length = path_of(dir, whole);
        if (length < 0) return 0;
        whole[length++] = '/';
    }
    snprintf(whole + length, sizeof whole - length, "%s", path);
    return fails(function, kind, whole);
}

static int fails_at_file(const char *function, int fd) {
    char path[PATH_MAX];
    return mine && path_of(fd, path) > 0 && fails(function, BYTES, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        if (WRITES(flags) && fails_at_path("open", OPENS, AT_FDCWD, path)) return die_or_fail();                       \
        return REAL(name)(path, flags, mode);                                                                          \
    }
#define OPENAT(name)                                                                                                   \
    int name(int dir, const char *path, int flags, ...) {                                                              \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        if (WRITES(flags) && fails_at_path("open", OPENS, dir, path)) return die_or_fail();                            \
        return REAL(name)(dir, path, flags, mode);                                                                     \
    }
#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        if (strpbrk(mode, "wa+") && fails_at_path("open", OPENS, AT_FDCWD, path)) return die_or_fail(), NULL;          \
        return REAL(name)(path, mode);                                                                                 \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

/* A disk that becomes full takes the first half of what comes, and a killed process has written half of it. */
#define HALF(size) (fails_with && (once || (mine && mine->hits > 1)) ? 0 : (size) / 2)

ssize_t write(int fd, const void *bytes, size_t size) {
    if (!fails_at_file("write", fd)) return REAL(write)(fd, bytes, size);
    ssize_t written = HALF(size) ? REAL(write)(fd, bytes, HALF(size)) : 0;
    return written > 0 && fails_with ? written : die_or_fail();
}
#define PWRITE(name, offset_type)                                                                                      \
    ssize_t name(int fd, const void *bytes, size_t size, offset_type offset) {                                         \
        if (!fails_at_file("pwrite", fd)) return REAL(name)(fd, bytes, size, offset);                                  \
        ssize_t written = HALF(size) ? REAL(name)(fd, bytes, HALF(size), offset) : 0;                                  \
        return written > 0 && fails_with ? written : die_or_fail();                                                    \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define BYTES_CALL(type, name, parameters, arguments, fd)                                                              \
    type name parameters { return fails_at_file(#name, fd) ? die_or_fail() : REAL(name) arguments; }
BYTES_CALL(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count), fd)
BYTES_CALL(int, ftruncate, (int fd, off_t size), (fd, size), fd)
BYTES_CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), fd)
BYTES_CALL(int, fallocate, (int fd, int mode, off_t start, off_t size), (fd, mode, start, size), fd)
BYTES_CALL(int, fallocate64, (int fd, int mode, off64_t start, off64_t size), (fd, mode, start, size), fd)
BYTES_CALL(ssize_t, sendfile, (int fd, int from, off_t *start, size_t size), (fd, from, start, size), fd)
BYTES_CALL(ssize_t, sendfile64, (int fd, int from, off64_t *start, size_t size), (fd, from, start, size), fd)
BYTES_CALL(ssize_t, copy_file_range,
           (int from, off64_t *start, int fd, off64_t *to, size_t size, unsigned flags),
           (from, start, fd, to, size, flags), fd)

/* These two give the error as their value. */
#define ALLOCATE(name, offset_type)                                                                                    \
    int name(int fd, offset_type start, offset_type size) {                                                            \
        if (!fails_at_file("fallocate", fd)) return REAL(name)(fd, start, size);                                       \
        die_or_fail();                                                                                                 \
        return fails_with;                                                                                             \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define PATH_CALL(name, kind, parameters, arguments, dir, path)                                                        \
    int name parameters { return fails_at_path(#name, kind, dir, path) ? die_or_fail() : REAL(name) arguments; }
PATH_CALL(mkdir, NAMES, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
PATH_CALL(mkdirat, NAMES, (int dir, const char *path, mode_t mode), (dir, path, mode), dir, path)
PATH_CALL(rename, NAMES, (const char *old, const char *new), (old, new), AT_FDCWD, new)
PATH_CALL(renameat, NAMES, (int from, const char *old, int dir, const char *new), (from, old, dir, new), dir, new)
PATH_CALL(link, NAMES, (const char *old, const char *new), (old, new), AT_FDCWD, new)
PATH_CALL(symlink, NAMES, (const char *old, const char *new), (old, new), AT_FDCWD, new)
PATH_CALL(chmod, REMOVES, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
PATH_CALL(unlink, REMOVES, (const char *path), (path), AT_FDCWD, path)
PATH_CALL(unlinkat, REMOVES, (int dir, const char *path, int flags), (dir, path, flags), dir, path)
PATH_CALL(rmdir, REMOVES, (const char *path), (path), AT_FDCWD, path)
