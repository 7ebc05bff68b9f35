#include "runtime/disk/range_files.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <stdexcept>

namespace distzo2 {

namespace {

struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
};

// This thread's buffer of kMiB, which starts on a page.
std::byte* staging() {
    thread_local const std::unique_ptr<std::byte, Free> buffer(
        static_cast<std::byte*>(std::aligned_alloc(kPageBytes, kMiB)));
    if (!buffer)
        throw std::bad_alloc();
    return buffer.get();
}

} // namespace

RangeFiles::RangeFiles(std::vector<std::string> paths, std::vector<size_t> block_bytes,
                       std::vector<std::vector<FileRange>> blocks, std::optional<bool> direct, FileCalls* calls)
    : calls_(calls != nullptr ? *calls : FileCalls::system()), files_(paths.size()),
      block_bytes_(std::move(block_bytes)), blocks_(std::move(blocks)) {
    if (blocks_.size() != block_bytes_.size())
        throw std::invalid_argument(
            join_text("range files: ", block_bytes_.size(), " sizes for ", blocks_.size(), " blocks"));
    try {
        for (size_t i = 0; i < files_.size(); ++i) {
            files_[i].path = std::move(paths[i]);
            open(files_[i], direct);
        }
        for (size_t block = 0; block < blocks_.size(); ++block)
            check(block);
    } catch (...) {
        for (const File& file : files_)
            if (file.descriptor >= 0)
                calls_.close(file.descriptor);
        throw;
    }
}

RangeFiles::~RangeFiles() {
    for (const File& file : files_)
        calls_.close(file.descriptor);
}

void RangeFiles::open(File& file, std::optional<bool> direct) {
    file.descriptor = calls_.open(file.path.c_str(), O_RDONLY);
    if (file.descriptor < 0 || calls_.size(file.descriptor, &file.num_bytes) != 0)
        fail(file.path, ": cannot be opened: ", errno_text(errno));
    if (!direct.value_or(true))
        return;
    file.direct =
        calls_.set_direct(file.descriptor, true) == 0 && calls_.read(file.descriptor, staging(), kPageBytes, 0) >= 0;
    if (file.direct)
        return;
    fallback_ = join_text(file.path, ": the file system refuses it: ", errno_text(errno));
    if (direct.has_value())
        fail("O_DIRECT was demanded: ", fallback_);
    calls_.set_direct(file.descriptor, false);
}

void RangeFiles::check(size_t block) const {
    size_t end = 0;
    for (const FileRange& range : blocks_[block]) {
        if (range.file >= files_.size() || range.place < end || range.place > block_bytes_[block] ||
            range.num_bytes > block_bytes_[block] - range.place)
            throw std::invalid_argument(join_text("range files: ", range.num_bytes, " bytes of file ", range.file,
                                                  " at ", range.place, " of block ", block, " of ", block_bytes_[block],
                                                  " bytes"));
        end = range.place + range.num_bytes;
        const File& file = files_[range.file];
        if (range.offset > file.num_bytes || range.num_bytes > file.num_bytes - range.offset)
            fail(file.path, ": is truncated: ", file.num_bytes, " bytes, expected at least ",
                 range.offset + range.num_bytes);
    }
}

void RangeFiles::read(size_t block, void* to, size_t num_bytes, size_t offset) {
    if (block >= blocks_.size() || offset > block_bytes_[block] || num_bytes > block_bytes_[block] - offset)
        throw std::out_of_range(join_text("no bytes ", offset, " to ", offset + num_bytes, " of block ", block));
    auto* const address = static_cast<std::byte*>(to);
    size_t at = offset; // in the block: what is before is read
    const size_t stop = offset + num_bytes;
    for (const FileRange& range : blocks_[block]) {
        const size_t begin = std::clamp(range.place, at, stop);
        const size_t end = std::clamp(range.place + range.num_bytes, begin, stop);
        std::memset(address + (at - offset), 0, begin - at);
        if (end > begin)
            read_range(files_[range.file], address + (begin - offset), end - begin,
                       range.offset + (begin - range.place));
        at = end;
    }
    std::memset(address + (at - offset), 0, stop - at);
    bytes_read_.fetch_add(num_bytes, std::memory_order_relaxed);
}

void RangeFiles::read_range(const File& file, std::byte* to, size_t num_bytes, size_t offset) const {
    if (!file.direct)
        return read_plain(file, to, num_bytes, num_bytes, offset);
    for (size_t done = 0; done < num_bytes;) {
        const size_t in_page = (offset + done) % kPageBytes, left = num_bytes - done;
        size_t part = align_down(left, kPageBytes);
        if (in_page == 0 && part > 0 && is_page_aligned(to + done)) {
            read_plain(file, to + done, part, part, offset + done);
        } else {
            part = std::min(left, kMiB - in_page);
            std::byte* const buffer = staging();
            read_plain(file, buffer, in_page + part, align_up(in_page + part, kPageBytes), offset + done - in_page);
            std::memcpy(to + done, buffer + in_page, part);
        }
        done += part;
    }
}

// At least `least_bytes`, and up to num_bytes: the last page of a file is not whole.
void RangeFiles::read_plain(const File& file, std::byte* to, size_t least_bytes, size_t num_bytes,
                            size_t offset) const {
    for (size_t done = 0; done < least_bytes;) {
        const ssize_t count = calls_.read(file.descriptor, to + done, num_bytes - done, offset + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            fail(file.path, ": cannot read ", num_bytes - done, " bytes at offset ", offset + done, ": ",
                 errno_text(errno));
        done += static_cast<size_t>(count);
        // A direct read is short in mid-page only where the file ends.
        if (done < least_bytes && (count == 0 || (file.direct && done % kPageBytes != 0)))
            fail(file.path, ": has become shorter: wanted ", least_bytes, " bytes at offset ", offset, ", got ", done);
    }
}

RangeFiles::Stats RangeFiles::stats() const {
    const bool direct = std::all_of(files_.begin(), files_.end(), [](const File& file) { return file.direct; });
    return {direct, fallback_, std::accumulate(block_bytes_.begin(), block_bytes_.end(), size_t{0}),
            bytes_read_.load()};
}

} // namespace distzo2
