// The system calls that a block file makes, in one table, so that tests can let each of them fail, fall short, or be
// cut off by a power failure. All return -1 with errno set, as the calls themselves do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>

namespace distzo2 {

class FileCalls {
  public:
    virtual ~FileCalls() = default;
    virtual int open(const char* path, int flags);
    virtual int close(int descriptor);
    virtual int lock(int descriptor); // for this process alone, or EWOULDBLOCK
    virtual int set_direct(int descriptor, bool direct);
    virtual int stat(const char* path, struct stat* status);
    virtual int size(int descriptor, size_t* num_bytes);
    virtual int free_bytes(int descriptor, size_t* num_bytes);
    virtual int truncate(int descriptor, size_t num_bytes);
    virtual int allocate(int descriptor, size_t num_bytes);
    virtual ssize_t read(int descriptor, void* to, size_t num_bytes, size_t offset);
    virtual ssize_t write(int descriptor, const void* from, size_t num_bytes, size_t offset);
    virtual int sync(int descriptor);             // fdatasync
    virtual int sync_directory(const char* path); // of the file `path`: its name is on the disk when it returns
    virtual int unlink(const char* path);

    static FileCalls& system();
};

} // namespace distzo2
