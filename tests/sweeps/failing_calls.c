/* Makes calls on files below a folder fail: preload this library, then call failing_arm in the process.
   cc -shared -fPIC -o failing_calls.so failing_calls.c -ldl */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int target, error, lasting;
static atomic_int calls, armed;

/* From now on the calls are counted; the one of this number (the first is 1) fails with this error, those after it too
   if it is lasting. Error 0: the process is killed instead of making the call. */
void failing_arm(const char *below, int number, int with, int forever) {
  snprintf(folder, sizeof folder, "%s/", below);
  target = number, error = with, lasting = forever;
  calls = 0;
  armed = 1;
}

/* How many calls were counted; no more are, and none fails. */
int failing_disarm(void) {
  armed = 0;
  return calls;
}

static int fails(const char *path) {
  if (strncmp(path, folder, strlen(folder))) return 0;
  int number = ++calls;
  if (number != target && !(lasting && number > target)) return 0;
  if (!error) kill(getpid(), SIGKILL);
  errno = error;
  return 1;
}

static int at_fails(int directory, const char *path) {
  char absolute[2 * PATH_MAX], link[64];
  if (!armed || !path) return 0;
  if (*path == '/' || directory == AT_FDCWD) return fails(path);
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, absolute, PATH_MAX);
  if (length < 0) return 0;
  snprintf(absolute + length, PATH_MAX, "/%s", path);
  return fails(absolute);
}

static int open_fails(int file) {
  int before = errno, failed = 0;
  if (armed) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0) path[length] = 0, failed = fails(path);
  }
  if (!failed) errno = before;
  return failed;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, parameters, arguments, failed, failure) \
  type name parameters { return failed ? failure : REAL(name) arguments; }
#define OF_PATH(type, name, parameters, arguments) WRAP(type, name, parameters, arguments, at_fails(AT_FDCWD, path), -1)
#define OF_PLACE(name, parameters, arguments) WRAP(int, name, parameters, arguments, at_fails(place, path), -1)
#define OF_FILE(type, name, parameters, arguments) WRAP(type, name, parameters, arguments, open_fails(file), -1)
#define MODE(flags) \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { MODE(flags) return at_fails(AT_FDCWD, path) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) \
  int name(int place, const char *path, int flags, ...) { MODE(flags) return at_fails(place, path) ? -1 : REAL(name)(place, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

OF_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode))
OF_PATH(int, rmdir, (const char *path), (path))
OF_PATH(int, unlink, (const char *path), (path))
OF_PATH(int, rename, (const char *path, const char *to), (path, to))
OF_PATH(int, link, (const char *path, const char *to), (path, to))
OF_PATH(int, stat, (const char *path, struct stat *into), (path, into))
OF_PATH(int, lstat, (const char *path, struct stat *into), (path, into))
OF_PATH(int, stat64, (const char *path, struct stat64 *into), (path, into))
OF_PATH(int, lstat64, (const char *path, struct stat64 *into), (path, into))
WRAP(DIR *, opendir, (const char *path), (path), at_fails(AT_FDCWD, path), NULL)
OF_PLACE(mkdirat, (int place, const char *path, mode_t mode), (place, path, mode))
OF_PLACE(unlinkat, (int place, const char *path, int flags), (place, path, flags))
OF_PLACE(renameat, (int place, const char *path, int other, const char *to), (place, path, other, to))
OF_PLACE(linkat, (int place, const char *path, int other, const char *to, int flags), (place, path, other, to, flags))
OF_PLACE(fstatat, (int place, const char *path, struct stat *into, int flags), (place, path, into, flags))
OF_PLACE(fstatat64, (int place, const char *path, struct stat64 *into, int flags), (place, path, into, flags))
OF_FILE(ssize_t, read, (int file, void *bytes, size_t size), (file, bytes, size))
OF_FILE(ssize_t, pread, (int file, void *bytes, size_t size, off_t at), (file, bytes, size, at))
OF_FILE(ssize_t, pread64, (int file, void *bytes, size_t size, off64_t at), (file, bytes, size, at))
OF_FILE(ssize_t, write, (int file, const void *bytes, size_t size), (file, bytes, size))
OF_FILE(ssize_t, pwrite, (int file, const void *bytes, size_t size, off_t at), (file, bytes, size, at))
OF_FILE(ssize_t, pwrite64, (int file, const void *bytes, size_t size, off64_t at), (file, bytes, size, at))
OF_FILE(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count))
OF_FILE(int, fsync, (int file), (file))
OF_FILE(int, fdatasync, (int file), (file))
OF_FILE(int, ftruncate, (int file, off_t size), (file, size))
OF_FILE(int, ftruncate64, (int file, off64_t size), (file, size))
OF_FILE(int, fstat, (int file, struct stat *into), (file, into))
OF_FILE(int, fstat64, (int file, struct stat64 *into), (file, into))

int close(int file) { /* a close that fails has closed the file */
  int failed = open_fails(file), before = errno, result = REAL(close)(file);
  if (failed) errno = before;
  return failed ? -1 : result;
}
