#include "runtime/block_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>

namespace distzo2 {
namespace {

constexpr char kMagic[16] = "distzo2 blocks1";
constexpr size_t kBounceBytes = kMiB;

struct alignas(kPageBytes) Page {
    std::byte bytes[kPageBytes];
};

struct Header {
    char magic[16];
    uint64_t num_blocks;
    uint64_t file_bytes;
    uint64_t layout_hash;
};

// FNV-1a over the sizes: tells one layout from another.
uint64_t hash_layout(const std::vector<size_t>& block_bytes) {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const uint64_t num_bytes : block_bytes)
        for (int shift = 0; shift < 64; shift += 8)
            hash = (hash ^ (num_bytes >> shift & 0xff)) * 0x100000001b3ull;
    return hash;
}

struct FreeDeleter {
    void operator()(std::byte* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<std::byte, FreeDeleter>;

Buffer make_buffer(size_t num_bytes) {
    Buffer buffer(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, num_bytes)));
    if (!buffer)
        throw std::bad_alloc();
    return buffer;
}

} // namespace

struct BlockFile::Counters {
    std::atomic<uint64_t> bytes_read{0};
    std::atomic<uint64_t> bytes_written{0};
};

BlockFile::BlockFile(std::string path, std::vector<size_t> block_bytes, bool create, std::optional<bool> direct)
    : path_(std::move(path)), block_bytes_(std::move(block_bytes)), file_bytes_(kPageBytes),
      counters_(std::make_unique<Counters>()) {
    if (block_bytes_.empty())
        throw std::invalid_argument("BlockFile: expected at least one block");
    for (const size_t num_bytes : block_bytes_) {
        if (num_bytes > SIZE_MAX / 4 - file_bytes_)
            throw std::invalid_argument(join_text("BlockFile: a block of ", num_bytes, " bytes"));
        offsets_.push_back(file_bytes_);
        bytes_used_ += num_bytes;
        file_bytes_ += align_up(num_bytes, kPageBytes);
    }
    bool ours = false; // from here on the file may be removed when something fails
    try {
        struct stat before{};
        const bool present = stat(path_.c_str(), &before) == 0;
        if (present && !S_ISREG(before.st_mode))
            fail("block file ", path_, ": is there already and is no regular file");
        descriptor_ = open(path_.c_str(), O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0644);
        if (descriptor_ < 0)
            fail("block file ", path_, ": cannot be opened: ", errno_text(errno));
        if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0)
            fail("block file ", path_, ": is in use by another run: ", errno_text(errno));
        if (!create) {
            check_header();
        } else if (present && before.st_size > 0) {
            char magic[sizeof kMagic] = {};
            if (pread(descriptor_, magic, sizeof magic, 0) != sizeof magic || std::memcmp(magic, kMagic, sizeof magic))
                fail("block file ", path_, ": is there already and is no block file; it was left as it is");
        }
        ours = create;
        if (create)
            allocate();
        if (direct.value_or(true) && !try_direct() && direct.has_value())
            fail("block file ", path_, ": O_DIRECT was demanded: ", fallback_);
    } catch (...) {
        if (ours)
            ::unlink(path_.c_str());
        if (descriptor_ >= 0)
            ::close(descriptor_);
        throw;
    }
}

BlockFile::~BlockFile() { ::close(descriptor_); }

void BlockFile::allocate() {
    if (ftruncate(descriptor_, 0) != 0)
        fail("block file ", path_, ": cannot be truncated: ", errno_text(errno));
    struct statvfs space{};
    if (fstatvfs(descriptor_, &space) != 0)
        fail("block file ", path_, ": cannot tell the free space: ", errno_text(errno));
    const size_t available = static_cast<size_t>(space.f_bavail) * space.f_frsize;
    if (file_bytes_ > available)
        fail("block file ", path_, ": needs ", bytes_text(file_bytes_), ", and its file system has ",
             bytes_text(available), " available: ", errno_text(ENOSPC));
    int result = 0;
    do
        result = fallocate(descriptor_, 0, 0, static_cast<off_t>(file_bytes_));
    while (result != 0 && errno == EINTR);
    if (result != 0 && (errno == EOPNOTSUPP || errno == ENOSYS)) {
        preallocated_ = false;
        result = ftruncate(descriptor_, static_cast<off_t>(file_bytes_));
    }
    if (result != 0)
        fail("block file ", path_, ": cannot get ", bytes_text(file_bytes_), " (", bytes_text(available),
             " available): ", errno_text(errno));
    Page page{};
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    header.num_blocks = block_bytes_.size();
    header.file_bytes = file_bytes_;
    header.layout_hash = hash_layout(block_bytes_);
    std::memcpy(page.bytes, &header, sizeof header);
    write_plain(page.bytes, kPageBytes, 0);
}

void BlockFile::check_header() {
    Page page{};
    Header header{};
    const ssize_t count = pread(descriptor_, page.bytes, kPageBytes, 0);
    std::memcpy(&header, page.bytes, sizeof header);
    if (count != static_cast<ssize_t>(kPageBytes) || std::memcmp(header.magic, kMagic, sizeof kMagic) != 0)
        fail("block file ", path_, ": has no block file's header");
    if (header.num_blocks != block_bytes_.size() || header.layout_hash != hash_layout(block_bytes_))
        fail("block file ", path_, ": holds another layout: ", header.num_blocks, " blocks in ", header.file_bytes,
             " bytes, expected ", block_bytes_.size(), " blocks in ", file_bytes_);
    struct stat status{};
    if (fstat(descriptor_, &status) != 0 || static_cast<size_t>(status.st_size) < file_bytes_)
        fail("block file ", path_, ": is truncated: ", status.st_size, " bytes, expected ", file_bytes_);
}

// Tries a read of the header page, since some file systems take the flag and refuse the first transfer.
bool BlockFile::try_direct() {
    const int flags = fcntl(descriptor_, F_GETFL);
    Page page;
    if (fcntl(descriptor_, F_SETFL, flags | O_DIRECT) == 0 &&
        pread(descriptor_, page.bytes, kPageBytes, 0) == static_cast<ssize_t>(kPageBytes)) {
        direct_ = true;
        return true;
    }
    fallback_ = join_text("the file system refuses it: ", errno_text(errno));
    fcntl(descriptor_, F_SETFL, flags);
    return false;
}

size_t BlockFile::check_range(size_t block, size_t num_bytes, size_t offset) const {
    if (block >= block_bytes_.size())
        throw std::out_of_range(join_text("no block ", block, ": the block file has ", block_bytes_.size()));
    if (offset > block_bytes_[block] || num_bytes > block_bytes_[block] - offset)
        throw std::out_of_range(join_text("bytes ", offset, " to ", offset + num_bytes, " of block ", block,
                                          ", which has ", block_bytes_[block]));
    return offsets_[block] + offset;
}

void BlockFile::read_plain(void* to, size_t num_bytes, size_t file_offset) const {
    auto* address = static_cast<std::byte*>(to);
    size_t done = 0;
    while (done < num_bytes) {
        const ssize_t count =
            pread(descriptor_, address + done, num_bytes - done, static_cast<off_t>(file_offset + done));
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            fail("block file ", path_, ": cannot read ", num_bytes - done, " bytes at offset ", file_offset + done,
                 ": ", errno_text(errno));
        done += static_cast<size_t>(count);
        // A direct read is short in mid-page only where the file ends.
        if (done < num_bytes && (count == 0 || (direct_ && done % kPageBytes != 0)))
            fail("block file ", path_, ": is truncated: wanted ", num_bytes, " bytes at offset ", file_offset, ", got ",
                 done);
    }
    counters_->bytes_read.fetch_add(num_bytes, std::memory_order_relaxed);
}

void BlockFile::write_plain(const void* from, size_t num_bytes, size_t file_offset) {
    const auto* address = static_cast<const std::byte*>(from);
    size_t done = 0;
    while (done < num_bytes) {
        const ssize_t count =
            pwrite(descriptor_, address + done, num_bytes - done, static_cast<off_t>(file_offset + done));
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            fail("block file ", path_, ": cannot write ", num_bytes - done, " bytes at offset ", file_offset + done,
                 ": ", count == 0 ? "nothing was written" : errno_text(errno));
        done += static_cast<size_t>(count);
    }
    counters_->bytes_written.fetch_add(num_bytes, std::memory_order_relaxed);
}

void BlockFile::read(size_t block, void* to, size_t num_bytes, size_t offset, size_t tail_bytes) const {
    size_t place = check_range(block, num_bytes, offset);
    if (!direct_)
        return read_plain(to, num_bytes, place);
    auto* address = static_cast<std::byte*>(to);
    Buffer buffer;
    while (num_bytes > 0) {
        const size_t in_page = place % kPageBytes;
        size_t part = 0;
        if (in_page == 0 && is_page_aligned(address) &&
            (num_bytes >= kPageBytes || num_bytes + tail_bytes >= kPageBytes)) {
            const size_t padded = align_up(num_bytes, kPageBytes);
            const size_t direct_bytes = padded - num_bytes <= tail_bytes ? padded : align_down(num_bytes, kPageBytes);
            part = std::min(num_bytes, direct_bytes);
            read_plain(address, direct_bytes, place);
        } else {
            if (!buffer)
                buffer = make_buffer(kBounceBytes);
            part = std::min(num_bytes, kBounceBytes - in_page);
            read_plain(buffer.get(), align_up(in_page + part, kPageBytes), place - in_page);
            std::memcpy(address, buffer.get() + in_page, part);
        }
        address += part;
        place += part;
        num_bytes -= part;
    }
}

void BlockFile::write(size_t block, const void* from, size_t num_bytes, size_t offset) {
    size_t place = check_range(block, num_bytes, offset);
    const size_t block_end = offsets_[block] + block_bytes_[block];
    if (!direct_)
        return write_plain(from, num_bytes, place);
    const auto* address = static_cast<const std::byte*>(from);
    Buffer buffer;
    while (num_bytes > 0) {
        const size_t in_page = place % kPageBytes;
        size_t part = align_down(num_bytes, kPageBytes);
        if (in_page == 0 && part > 0 && is_page_aligned(address)) {
            write_plain(address, part, place);
        } else if (in_page == 0 && part > 0) {
            if (!buffer)
                buffer = make_buffer(kBounceBytes);
            part = std::min(part, kBounceBytes);
            std::memcpy(buffer.get(), address, part);
            write_plain(buffer.get(), part, place);
        } else {
            Page page{};
            part = std::min(num_bytes, kPageBytes - in_page);
            const std::lock_guard lock(partial_page_);
            if (in_page != 0 || place + part != block_end) // else the rest of the page is padding
                read_plain(page.bytes, kPageBytes, place - in_page);
            std::memcpy(page.bytes + in_page, address, part);
            write_plain(page.bytes, kPageBytes, place - in_page);
        }
        address += part;
        place += part;
        num_bytes -= part;
    }
}

void BlockFile::sync() {
    if (fdatasync(descriptor_) != 0)
        fail("block file ", path_, ": cannot be synced: ", errno_text(errno));
}

BlockFile::Stats BlockFile::stats() const {
    return {direct_,
            preallocated_,
            bytes_used_,
            file_bytes_,
            counters_->bytes_read.load(),
            counters_->bytes_written.load(),
            fallback_};
}

void BlockFile::unlink() {
    if (unlinked_)
        return;
    if (::unlink(path_.c_str()) != 0 && errno != ENOENT)
        fail("block file ", path_, ": cannot be removed: ", errno_text(errno));
    unlinked_ = true;
}

} // namespace distzo2
