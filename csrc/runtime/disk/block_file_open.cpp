// Makes a block file, or opens one and reads its map. A forked child closes the files of its parent at once: the lock
// belongs to the open file, so that it would outlive a killed process in its children (a data loader's workers).
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <random>
#include <stdexcept>

#include "runtime/disk/block_file.h"
#include "runtime/disk/crc32c.h"
#include "runtime/mutations.h"

namespace distzo2 {

void BlockFile::FreeDeleter::operator()(std::byte* memory) const { std::free(memory); }

BlockFile::Buffer BlockFile::make_buffer(size_t num_bytes) {
    Buffer buffer(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, num_bytes)));
    if (!buffer)
        throw std::bad_alloc();
    return buffer;
}

BlockFile::BlockFile(std::string path, std::vector<size_t> block_bytes, bool create, std::optional<bool> direct,
                     const BlockFileOptions& options)
    : path_(std::move(path)), layout_(std::move(block_bytes), options.part_bytes, options.durable || !create),
      calls_(options.calls != nullptr ? *options.calls : FileCalls::system()), blocks_(layout_.block_bytes.size()),
      slots_(layout_.class_of_slot.size()), spares_(layout_.classes.size()) {
    open(create, direct);
}

// The list is locked over a fork, so that the child finds it whole.
struct BlockFile::OpenFiles {
    std::mutex mutex;
    std::vector<BlockFile*> files;

    static OpenFiles& of_process() {
        static OpenFiles* const instance = [] { // never destroyed: a fork may come late
            pthread_atfork([] { of_process().mutex.lock(); }, [] { of_process().mutex.unlock(); }, in_child);
            return new OpenFiles;
        }();
        return *instance;
    }
    static void in_child() {
        OpenFiles& open = of_process();
        for (BlockFile* file : open.files) {
            file->calls_.close(file->descriptor_);
            file->descriptor_ = -1;
        }
        open.files.clear();
        open.mutex.unlock();
    }
    void add(BlockFile* file) {
        const std::lock_guard lock(mutex);
        files.push_back(file);
    }
    // Closes it too, at once: between the two a child would be left with it.
    void close(BlockFile* file) {
        const std::lock_guard lock(mutex);
        std::erase(files, file);
        if (file->descriptor_ >= 0)
            file->calls_.close(file->descriptor_);
    }
};

BlockFile::~BlockFile() { OpenFiles::of_process().close(this); }

void BlockFile::check_owner() const {
    if (descriptor_ < 0)
        fail("block file ", path_, ": belongs to the process that opened it, and this is a forked child");
}

void BlockFile::open(bool create, std::optional<bool> direct) {
    bool ours = false; // the file may be removed when something fails
    try {
        struct stat before{};
        const bool present = calls_.stat(path_.c_str(), &before) == 0;
        if (present && !S_ISREG(before.st_mode))
            fail("block file ", path_, ": is there already and is no regular file");
        descriptor_ = calls_.open(path_.c_str(), O_RDWR | (create ? O_CREAT : 0));
        if (descriptor_ < 0)
            fail("block file ", path_, ": cannot be opened: ", errno_text(errno));
        OpenFiles::of_process().add(this);
        if (calls_.lock(descriptor_) != 0)
            fail("block file ", path_,
                 errno == EWOULDBLOCK ? ": is in use by another run: " : ": cannot be locked: ", errno_text(errno));
        const bool empty = !present || before.st_size == 0;
        if (create && !empty) {
            char magic[kMagicFamily] = {};
            if (calls_.read(descriptor_, magic, sizeof magic, 0) != sizeof magic ||
                std::memcmp(magic, kMagic, sizeof magic) != 0)
                fail("block file ", path_, ": is there already and is no block file; it was left as it is");
        }
        ours = create && empty;
        if (create) {
            check_space(empty ? 0 : static_cast<size_t>(before.st_blocks) * 512);
            ours = true;
            allocate();
        } else {
            check_file();
        }
        make_slots();
        if (create)
            make_map();
        if (direct.value_or(true) && !try_direct() && direct.has_value())
            fail("block file ", path_, ": O_DIRECT was demanded: ", fallback_);
        if (!create)
            load_map();
        give_spares();
    } catch (...) {
        if (ours)
            calls_.unlink(path_.c_str());
        OpenFiles::of_process().close(this);
        throw;
    }
}

// Where the slots lie, and memory for their checksums: only now, since a layout that no disk can hold asks for much.
void BlockFile::make_slots() {
    size_t max_entry_bytes = 0;
    for (size_t block = 0; block < blocks_.size(); ++block)
        max_entry_bytes = std::max(max_entry_bytes, layout_.entry_bytes(block));
    entry_ = make_buffer(max_entry_bytes);
    waiting_.reserve(blocks_.size());
    batch_.reserve(blocks_.size());
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
        slots_[slot].offset = layout_.slot_offset(slot);
        const size_t slot_bytes = layout_.classes[layout_.class_of_slot[slot]].slot_bytes;
        slots_[slot].checksums.resize((slot_bytes + layout_.part_bytes - 1) / layout_.part_bytes);
    }
}

void BlockFile::give_spares() {
    std::vector<bool> is_used(slots_.size(), false);
    for (const Block& block : blocks_)
        is_used[block.slot] = true;
    for (size_t index = 0; index < spares_.size(); ++index)
        spares_[index].reserve(layout_.classes[index].num_slots);
    for (size_t slot = slots_.size(); slot-- > 0;)
        if (!is_used[slot])
            spares_[layout_.class_of_slot[slot]].push_back(slot);
}

// `space_freed`: of the file that this one replaces.
void BlockFile::check_space(size_t space_freed) {
    size_t available = 0;
    if (calls_.free_bytes(descriptor_, &available) != 0)
        fail("block file ", path_, ": cannot tell the free space: ", errno_text(errno));
    available += space_freed;
    if (layout_.file_bytes > available)
        fail("block file ", path_, ": needs ", bytes_text(layout_.file_bytes), ", and its file system has ",
             bytes_text(available), " available: ", errno_text(ENOSPC));
}

void BlockFile::allocate() {
    if (calls_.truncate(descriptor_, 0) != 0)
        fail("block file ", path_, ": cannot be truncated: ", errno_text(errno));
    int result = 0;
    do
        result = calls_.allocate(descriptor_, layout_.file_bytes);
    while (result != 0 && errno == EINTR);
    if (result != 0 && (errno == EOPNOTSUPP || errno == ENOSYS)) {
        preallocated_ = false;
        result = calls_.truncate(descriptor_, layout_.file_bytes);
    }
    if (result != 0)
        fail("block file ", path_, ": cannot get ", bytes_text(layout_.file_bytes), ": ", errno_text(errno));
}

// Every block is zeros, and its checksums say so. The header goes last: without it, it is no block file yet.
void BlockFile::make_map() {
    std::random_device random;
    id_.value = static_cast<uint64_t>(random()) << 32 | random();
    const std::vector<std::byte> zeros(layout_.part_bytes);
    const uint32_t whole = crc32c(zeros.data(), zeros.size());
    for (size_t block = 0; block < blocks_.size(); ++block) {
        Block& state = blocks_[block];
        state.slot = layout_.first_slot_of_block[block];
        auto& checksums = slots_[state.slot].checksums;
        std::fill(checksums.begin(), checksums.end(), whole);
        const size_t in_last = layout_.block_bytes[block] % layout_.part_bytes;
        if (in_last > 0)
            checksums[layout_.num_parts(block) - 1] = crc32c(zeros.data(), in_last);
        if (!layout_.durable)
            continue;
        state.next_slot = state.slot;
        write_entry_copy(block, 0);
        write_entry_copy(block, 1);
        state.next_slot = SIZE_MAX;
        state.generation = 1;
    }
    if (layout_.durable)
        sync_file();
    write_header(layout_, id_, entry_.get());
    write_plain(entry_.get(), kPageBytes, 0);
    if (!layout_.durable)
        return;
    sync_file();
    if (calls_.sync_directory(path_.c_str()) != 0)
        fail("block file ", path_, ": its directory cannot be synced: ", errno_text(errno));
}

// Tries a read of the header page, since some file systems take the flag and refuse the first transfer.
bool BlockFile::try_direct() {
    const Buffer page = make_buffer(kPageBytes);
    if (calls_.set_direct(descriptor_, true) == 0 &&
        calls_.read(descriptor_, page.get(), kPageBytes, 0) == static_cast<ssize_t>(kPageBytes)) {
        direct_ = true;
        return true;
    }
    fallback_ = join_text("the file system refuses it: ", errno_text(errno));
    calls_.set_direct(descriptor_, false);
    return false;
}

void BlockFile::check_file() {
    size_t num_bytes = 0;
    if (calls_.size(descriptor_, &num_bytes) != 0)
        fail("block file ", path_, ": cannot tell its size: ", errno_text(errno));
    if (num_bytes < kPageBytes)
        fail("block file ", path_, ": has no block file's header at offset 0: it is ", num_bytes, " bytes long");
    const Buffer page = make_buffer(kPageBytes);
    read_plain(page.get(), kPageBytes, 0);
    if (const std::string problem = check_header(layout_, page.get(), &id_); !problem.empty())
        fail("block file ", path_, ": ", problem);
    if (num_bytes < layout_.file_bytes)
        fail("block file ", path_, ": is truncated: ", num_bytes, " bytes, expected ", layout_.file_bytes);
}

// Of the two copies of an entry the later one counts; the other is made equal to it, so that a copy is always to spare.
void BlockFile::load_map() {
    sync_file(); // of a process that was killed: what is read below is on the disk before the other copies change
    bool repaired = false;
    std::vector<size_t> owner(slots_.size(), SIZE_MAX);
    std::vector<uint32_t> checksums[2];
    for (size_t block = 0; block < blocks_.size(); ++block) {
        MapEntry entries[2];
        bool valid[2];
        const size_t entry_bytes = layout_.entry_bytes(block);
        for (int copy = 0; copy < 2; ++copy) {
            const size_t offset = layout_.entry_offset[block] + static_cast<size_t>(copy) * entry_bytes;
            checksums[copy].resize(layout_.num_parts(block));
            read_plain(entry_.get(), entry_bytes, offset);
            valid[copy] = read_entry(layout_, id_, block, entry_.get(), &entries[copy], checksums[copy].data());
        }
        if (!valid[0] && !valid[1])
            fail("block file ", path_, ": both copies of the map's entry of block ", block, ", ", entry_bytes,
                 " bytes each at offsets ", layout_.entry_offset[block], " and ",
                 layout_.entry_offset[block] + entry_bytes, ", are damaged: expected a checksum that fits");
        const int latest = !valid[0] || (valid[1] && entries[1].generation > entries[0].generation) ? 1 : 0;
        const MapEntry& entry = entries[latest];
        const size_t own_class = layout_.class_of_block[block];
        if (entry.slot >= slots_.size() || layout_.class_of_slot[entry.slot] != own_class)
            fail("block file ", path_, ": the map's entry at offset ", layout_.entry_offset[block], " gives block ",
                 block, " slot ", entry.slot, ", expected one of ", layout_.classes[own_class].num_slots, " from ",
                 layout_.classes[own_class].first_slot);
        if (owner[entry.slot] != SIZE_MAX)
            fail("block file ", path_, ": the map's entries at offsets ", layout_.entry_offset[owner[entry.slot]],
                 " and ", layout_.entry_offset[block], " give slot ", entry.slot, " to blocks ", owner[entry.slot],
                 " and ", block, ", expected one");
        owner[entry.slot] = block;
        Block& state = blocks_[block];
        state.slot = entry.slot;
        state.version = entry.version;
        state.generation = entry.generation;
        std::copy(checksums[latest].begin(), checksums[latest].end(), slots_[entry.slot].checksums.begin());
        if (!valid[1 - latest] || entries[1 - latest].generation != entry.generation) {
            write_entry(layout_, id_, block, entry, checksums[latest].data(), entry_.get());
            write_plain(entry_.get(), entry_bytes,
                        layout_.entry_offset[block] + static_cast<size_t>(1 - latest) * entry_bytes);
            repaired = true;
        }
    }
    if (repaired)
        sync_file();
}

} // namespace distzo2
