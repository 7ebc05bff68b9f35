// The format of a block file: where its header, its map and its slots are, and what a header and a map entry say.
//
//   | header, 4096 | entry of block 0 | its copy | entry of block 1 | its copy ... | slots of class 0 | of class 1 ...
//
// Blocks of similar size (at most an eighth is wasted) form a class and share slots of the largest one's size. A class
// has one slot a block and up to three spare ones, where new bytes go before they replace the old. A block's entry says
// which slot holds it, its version, and the checksum of each part of `part_bytes`. A scratch file, which ends with its
// process, has no entries. Header and entries are whole pages, each with a checksum over all of it. All numbers are
// little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/common.h"

namespace distzo2 {

struct BlockLayout {
    // Throws std::invalid_argument for no blocks, blocks of more than the address space, or parts of no whole pages.
    BlockLayout(std::vector<size_t> block_bytes, size_t part_bytes, bool durable);

    struct SizeClass {
        size_t slot_bytes;
        size_t num_blocks;
        size_t first_slot;
        size_t num_slots;
    };

    size_t num_parts(size_t block) const { return (block_bytes[block] + part_bytes - 1) / part_bytes; }
    size_t entry_bytes(size_t block) const; // of one of the two copies
    size_t slot_offset(size_t slot) const;

    std::vector<size_t> block_bytes;
    size_t part_bytes;
    bool durable; // has a map
    std::vector<SizeClass> classes;
    std::vector<size_t> class_of_block;
    std::vector<size_t> class_of_slot;
    std::vector<size_t> first_slot_of_block; // in a new file
    std::vector<size_t> entry_offset;        // of the first copy; the other follows it
    size_t slots_offset = kPageBytes;
    size_t file_bytes = 0;
    size_t bytes_used = 0;
    uint64_t hash = 0; // tells one layout from another
};

// Identifies a file, in its header and entries, so that no entry of another file is taken for its own.
struct FileId {
    uint64_t value;
};

constexpr char kMagic[16] = "distzo2 blocks2";
constexpr size_t kMagicFamily = 14; // bytes that every version of the format begins with

// Both write to and read from whole pages.
void write_header(const BlockLayout& layout, FileId id, std::byte* page);
// Empty where the page is this layout's header; else what is wrong, with the offset in the file and what was expected.
std::string check_header(const BlockLayout& layout, const std::byte* page, FileId* id);

struct MapEntry {
    uint64_t generation = 0; // counts the writes of this entry
    int64_t version = 0;     // how many updates the block holds
    uint64_t slot = 0;
};

void write_entry(const BlockLayout& layout, FileId id, size_t block, const MapEntry& entry, const uint32_t* checksums,
                 std::byte* pages);
// Whether the pages hold an entry of the block; gives it and its checksums (num_parts) if so.
bool read_entry(const BlockLayout& layout, FileId id, size_t block, const std::byte* pages, MapEntry* entry,
                uint32_t* checksums);

} // namespace distzo2
