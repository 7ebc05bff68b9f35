#include "runtime/disk/file_calls.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <string>

namespace distzo2 {

int FileCalls::open(const char* path, int flags) { return ::open(path, flags | O_CLOEXEC, 0644); }
int FileCalls::close(int descriptor) { return ::close(descriptor); }
int FileCalls::lock(int descriptor) { return flock(descriptor, LOCK_EX | LOCK_NB); }

int FileCalls::set_direct(int descriptor, bool direct) {
    const int flags = fcntl(descriptor, F_GETFL);
    return flags < 0 ? -1 : fcntl(descriptor, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT);
}

int FileCalls::stat(const char* path, struct stat* status) { return ::stat(path, status); }

int FileCalls::size(int descriptor, size_t* num_bytes) {
    struct stat status{};
    if (fstat(descriptor, &status) != 0)
        return -1;
    *num_bytes = static_cast<size_t>(status.st_size);
    return 0;
}

int FileCalls::free_bytes(int descriptor, size_t* num_bytes) {
    struct statvfs space{};
    if (fstatvfs(descriptor, &space) != 0)
        return -1;
    *num_bytes = static_cast<size_t>(space.f_bavail) * space.f_frsize;
    return 0;
}

int FileCalls::truncate(int descriptor, size_t num_bytes) {
    return ftruncate(descriptor, static_cast<off_t>(num_bytes));
}

int FileCalls::allocate(int descriptor, size_t num_bytes) {
    return fallocate(descriptor, 0, 0, static_cast<off_t>(num_bytes));
}

ssize_t FileCalls::read(int descriptor, void* to, size_t num_bytes, size_t offset) {
    return pread(descriptor, to, num_bytes, static_cast<off_t>(offset));
}

ssize_t FileCalls::write(int descriptor, const void* from, size_t num_bytes, size_t offset) {
    return pwrite(descriptor, from, num_bytes, static_cast<off_t>(offset));
}

int FileCalls::sync(int descriptor) { return fdatasync(descriptor); }

int FileCalls::sync_directory(const char* path) {
    const std::string text(path);
    const size_t slash = text.rfind('/');
    const std::string directory = slash == std::string::npos ? "." : text.substr(0, slash + 1);
    const int descriptor = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0)
        return -1;
    const int result = fsync(descriptor);
    const int error = errno;
    ::close(descriptor);
    errno = error;
    return result;
}

int FileCalls::unlink(const char* path) { return ::unlink(path); }

FileCalls& FileCalls::system() {
    static FileCalls* const calls = new FileCalls; // outlives every file
    return *calls;
}

} // namespace distzo2
