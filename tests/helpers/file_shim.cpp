// Loaded before libc (LD_PRELOAD) by tests of files: counts the calls that change files below one directory, lets one
// of them fail, and records them all, so that a power cut at any of them can be played (power_cut.py).
//
// Linux with glibc. One lock orders calls and record. The record is lines, fields separated by tabs; a write's bytes
// follow its line:
//   C ino new truncated path | W ino offset length | T ino size | S ino | D path (a directory was synced)
//   M path (mkdir) | R path (rmdir) | U path (unlink) | N from to (rename) | L ino path (link)
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <mutex>
#include <string>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

namespace {

std::mutex mutex;
std::string root; // absolute, without a slash at the end; empty: nothing is watched
long fail_at = 0; // the first call is number 1; 0: none fails
int fail_errno = 0;
bool fail_on = false; // all calls from fail_at on fail
long num_calls = 0;
int record = -1;

template <typename Function>
Function real(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

#define REAL(name) static auto* const real_##name = real<decltype(&name)>(#name)

std::string of_descriptor(int descriptor) {
    char link[64], target[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, target, sizeof target);
    return length > 0 ? std::string(target, length) : std::string();
}

std::string absolute(int directory, const char* path) {
    if (path[0] == '/')
        return path;
    char here[PATH_MAX];
    const std::string base = directory == AT_FDCWD ? (getcwd(here, sizeof here) ? here : "") : of_descriptor(directory);
    return base + "/" + path;
}

bool watched(const std::string& path) {
    return !root.empty() && path.compare(0, root.size(), root) == 0 &&
           (path.size() == root.size() || path[root.size()] == '/');
}

// Whether this call, under `mutex`, is the one to fail; errno is set then.
bool fails() {
    ++num_calls;
    if (fail_at == 0 || (fail_on ? num_calls < fail_at : num_calls != fail_at))
        return false;
    errno = fail_errno;
    return true;
}

void put(const std::string& line, const void* data = nullptr, size_t num_bytes = 0) {
    if (record < 0)
        return;
    REAL(write);
    const int before = errno;
    if (real_write(record, line.data(), line.size()) < 0 || (num_bytes > 0 && real_write(record, data, num_bytes) < 0))
        abort();
    errno = before;
}

std::string number(unsigned long long value) { return std::to_string(value); }

std::string inode(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) == 0 ? number(status.st_ino) : "0";
}

template <typename Open>
int opened(int directory, const char* path, int flags, Open open) {
    if ((flags & (O_CREAT | O_TRUNC)) == 0)
        return open();
    const std::string full = absolute(directory, path);
    if (!watched(full))
        return open();
    const std::lock_guard<std::mutex> lock(mutex);
    struct stat status;
    const bool is_new = lstat(full.c_str(), &status) != 0;
    if (is_new && fails())
        return -1;
    const int descriptor = open();
    if (descriptor >= 0)
        put("C\t" + inode(descriptor) + "\t" + number(is_new) + "\t" + number((flags & O_TRUNC) != 0) + "\t" + full +
            "\n");
    return descriptor;
}

template <typename Call>
ssize_t written(int descriptor, const void* data, off_t offset, Call call) {
    const std::string path = of_descriptor(descriptor);
    if (!watched(path))
        return call();
    const std::lock_guard<std::mutex> lock(mutex);
    if (fails())
        return -1;
    const ssize_t done = call();
    if (done > 0) {
        const off_t begin = offset >= 0 ? offset : lseek(descriptor, 0, SEEK_CUR) - done;
        put("W\t" + inode(descriptor) + "\t" + number(begin) + "\t" + number(done) + "\n", data, done);
    }
    return done;
}

template <typename Call>
int synced(int descriptor, Call call) {
    const std::string path = of_descriptor(descriptor);
    if (!watched(path))
        return call();
    const std::lock_guard<std::mutex> lock(mutex);
    if (fails())
        return -1;
    struct stat status;
    const bool is_directory = fstat(descriptor, &status) == 0 && S_ISDIR(status.st_mode);
    const int result = call();
    if (result == 0)
        put(is_directory ? "D\t" + path + "\n" : "S\t" + inode(descriptor) + "\n");
    return result;
}

template <typename Call>
int sized(int descriptor, off_t size, Call call) {
    const std::string path = of_descriptor(descriptor);
    if (!watched(path))
        return call();
    const std::lock_guard<std::mutex> lock(mutex);
    if (fails())
        return -1;
    const int result = call();
    if (result == 0)
        put("T\t" + inode(descriptor) + "\t" + number(size) + "\n");
    return result;
}

// `line` is what is recorded when the call ends well; removing never fails.
template <typename Call>
int named(const std::string& path, const std::string& line, bool may_fail, Call call) {
    if (!watched(path))
        return call();
    const std::lock_guard<std::mutex> lock(mutex);
    if (may_fail && fails())
        return -1;
    const int result = call();
    if (result == 0)
        put(line);
    return result;
}

} // namespace

extern "C" {

// `path` takes the record; empty: none. Counting begins anew.
void shim_watch(const char* directory, const char* path, long at, int error, int on) {
    const std::lock_guard<std::mutex> lock(mutex);
    root = directory;
    num_calls = 0, fail_at = at, fail_errno = error, fail_on = on != 0;
    REAL(open);
    record = path[0] == 0 ? -1 : real_open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
}

long shim_num_calls() { return num_calls; }

#define OPEN(name)                                                                                                     \
    REAL(name);                                                                                                        \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        mode = va_arg(list, mode_t);                                                                                   \
        va_end(list);                                                                                                  \
    }

int open(const char* path, int flags, ...) {
    OPEN(open)
    return opened(AT_FDCWD, path, flags, [&] { return real_open(path, flags, mode); });
}
int open64(const char* path, int flags, ...) {
    OPEN(open64)
    return opened(AT_FDCWD, path, flags, [&] { return real_open64(path, flags, mode); });
}
int openat(int directory, const char* path, int flags, ...) {
    OPEN(openat)
    return opened(directory, path, flags, [&] { return real_openat(directory, path, flags, mode); });
}
int openat64(int directory, const char* path, int flags, ...) {
    OPEN(openat64)
    return opened(directory, path, flags, [&] { return real_openat64(directory, path, flags, mode); });
}

ssize_t write(int descriptor, const void* data, size_t num_bytes) {
    REAL(write);
    return written(descriptor, data, -1, [&] { return real_write(descriptor, data, num_bytes); });
}
ssize_t pwrite(int descriptor, const void* data, size_t num_bytes, off_t offset) {
    REAL(pwrite);
    return written(descriptor, data, offset, [&] { return real_pwrite(descriptor, data, num_bytes, offset); });
}
ssize_t pwrite64(int descriptor, const void* data, size_t num_bytes, off64_t offset) {
    REAL(pwrite64);
    return written(descriptor, data, offset, [&] { return real_pwrite64(descriptor, data, num_bytes, offset); });
}
// Python's shutil then copies through write().
ssize_t sendfile(int, int, off_t*, size_t) { return errno = ENOTSOCK, -1; }
ssize_t sendfile64(int, int, off64_t*, size_t) { return errno = ENOTSOCK, -1; }

int fsync(int descriptor) {
    REAL(fsync);
    return synced(descriptor, [&] { return real_fsync(descriptor); });
}
int fdatasync(int descriptor) {
    REAL(fdatasync);
    return synced(descriptor, [&] { return real_fdatasync(descriptor); });
}
int ftruncate(int descriptor, off_t size) {
    REAL(ftruncate);
    return sized(descriptor, size, [&] { return real_ftruncate(descriptor, size); });
}
int ftruncate64(int descriptor, off64_t size) {
    REAL(ftruncate64);
    return sized(descriptor, size, [&] { return real_ftruncate64(descriptor, size); });
}
int fallocate(int descriptor, int mode, off_t offset, off_t size) {
    REAL(fallocate);
    return sized(descriptor, offset + size, [&] { return real_fallocate(descriptor, mode, offset, size); });
}
int fallocate64(int descriptor, int mode, off64_t offset, off64_t size) {
    REAL(fallocate64);
    return sized(descriptor, offset + size, [&] { return real_fallocate64(descriptor, mode, offset, size); });
}
int posix_fallocate(int descriptor, off_t offset, off_t size) {
    REAL(posix_fallocate);
    const int result = sized(descriptor, offset + size, [&] { return real_posix_fallocate(descriptor, offset, size); });
    return result < 0 ? errno : result; // it returns its error
}
int posix_fallocate64(int descriptor, off64_t offset, off64_t size) {
    REAL(posix_fallocate64);
    const int result =
        sized(descriptor, offset + size, [&] { return real_posix_fallocate64(descriptor, offset, size); });
    return result < 0 ? errno : result;
}

int mkdir(const char* path, mode_t mode) {
    REAL(mkdir);
    const std::string full = absolute(AT_FDCWD, path);
    return named(full, "M\t" + full + "\n", true, [&] { return real_mkdir(path, mode); });
}
int rmdir(const char* path) {
    REAL(rmdir);
    const std::string full = absolute(AT_FDCWD, path);
    return named(full, "R\t" + full + "\n", false, [&] { return real_rmdir(path); });
}
int unlink(const char* path) {
    REAL(unlink);
    const std::string full = absolute(AT_FDCWD, path);
    return named(full, "U\t" + full + "\n", false, [&] { return real_unlink(path); });
}
int unlinkat(int directory, const char* path, int flags) {
    REAL(unlinkat);
    const std::string full = absolute(directory, path);
    return named(full, (flags & AT_REMOVEDIR ? "R\t" : "U\t") + full + "\n", false,
                 [&] { return real_unlinkat(directory, path, flags); });
}
int rename(const char* from, const char* to) {
    REAL(rename);
    const std::string old_path = absolute(AT_FDCWD, from), new_path = absolute(AT_FDCWD, to);
    return named(new_path, "N\t" + old_path + "\t" + new_path + "\n", true, [&] { return real_rename(from, to); });
}
int link(const char* from, const char* to) {
    REAL(link);
    const std::string full = absolute(AT_FDCWD, to);
    struct stat status;
    const std::string ino = lstat(from, &status) == 0 ? number(status.st_ino) : "0";
    return named(full, "L\t" + ino + "\t" + full + "\n", true, [&] { return real_link(from, to); });
}
int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) {
    REAL(linkat);
    const std::string full = absolute(to_directory, to);
    struct stat status;
    const std::string ino =
        fstatat(from_directory, from, &status, AT_SYMLINK_NOFOLLOW) == 0 ? number(status.st_ino) : "0";
    return named(full, "L\t" + ino + "\t" + full + "\n", true,
                 [&] { return real_linkat(from_directory, from, to_directory, to, flags); });
}
}
