#include "runtime/disk/block_layout.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "runtime/disk/crc32c.h"

namespace distzo2 {
namespace {

constexpr char kEntryMagic[8] = {'d', 'z', 'o', 'e', 'n', 't', 'r', 'y'};
constexpr size_t kMaxSpareSlots = 3;

struct Header {
    char magic[16];
    uint32_t checksum; // of the page with this as 0
    uint32_t durable;
    uint64_t part_bytes;
    uint64_t num_blocks;
    uint64_t file_bytes;
    uint64_t layout_hash;
    uint64_t file_id;
};

struct EntryHead {
    char magic[8];
    uint32_t checksum; // of the entry's pages with this as 0
    uint32_t num_parts;
    uint64_t block;
    uint64_t slot;
    uint64_t generation;
    int64_t version;
    uint64_t layout_hash;
    uint64_t file_id;
};

// With the field at `place` taken as 0.
uint32_t checksum_without(const std::byte* pages, size_t num_bytes, size_t place) {
    constexpr uint32_t kZero = 0;
    const uint32_t before = crc32c(&kZero, sizeof kZero, crc32c(pages, place));
    return crc32c(pages + place + sizeof kZero, num_bytes - place - sizeof kZero, before);
}

// FNV-1a, a number at a time.
uint64_t hash_numbers(uint64_t hash, uint64_t number) {
    for (int shift = 0; shift < 64; shift += 8)
        hash = (hash ^ (number >> shift & 0xff)) * 0x100000001b3ull;
    return hash;
}

} // namespace

BlockLayout::BlockLayout(std::vector<size_t> sizes, size_t bytes_of_part, bool with_map)
    : block_bytes(std::move(sizes)), part_bytes(bytes_of_part), durable(with_map) {
    if (block_bytes.empty())
        throw std::invalid_argument("BlockFile: expected at least one block");
    if (part_bytes == 0 || part_bytes % kPageBytes != 0)
        throw std::invalid_argument(join_text("BlockFile: parts of ", part_bytes, " bytes, expected whole pages"));
    hash = hash_numbers(0xcbf29ce484222325ull, part_bytes);
    for (size_t block = 0; block < block_bytes.size(); ++block) {
        const size_t num_bytes = block_bytes[block];
        if (num_bytes > SIZE_MAX / 16 - bytes_used)
            throw std::invalid_argument(join_text("BlockFile: a block of ", num_bytes, " bytes"));
        bytes_used += num_bytes;
        hash = hash_numbers(hash, num_bytes);
        entry_offset.push_back(slots_offset);
        slots_offset += durable ? 2 * entry_bytes(block) : 0;
    }
    const auto padded = [this](size_t block) { return align_up(std::max<size_t>(1, block_bytes[block]), kPageBytes); };
    std::vector<size_t> order(block_bytes.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t left, size_t right) { return padded(left) > padded(right); });
    class_of_block.resize(order.size());
    for (const size_t block : order) {
        if (classes.empty() || padded(block) < classes.back().slot_bytes / 8 * 7)
            classes.push_back({padded(block), 0, 0, 0});
        class_of_block[block] = classes.size() - 1;
        ++classes.back().num_blocks;
    }
    file_bytes = slots_offset;
    for (size_t index = 0; index < classes.size(); ++index) {
        SizeClass& one = classes[index];
        one.first_slot = class_of_slot.size();
        one.num_slots = one.num_blocks + std::min(one.num_blocks, kMaxSpareSlots);
        class_of_slot.insert(class_of_slot.end(), one.num_slots, index);
        file_bytes += one.num_slots * one.slot_bytes;
    }
    std::vector<size_t> next(classes.size(), 0);
    for (size_t block = 0; block < block_bytes.size(); ++block) // in their order within the class
        first_slot_of_block.push_back(classes[class_of_block[block]].first_slot + next[class_of_block[block]]++);
}

size_t BlockLayout::entry_bytes(size_t block) const {
    return align_up(sizeof(EntryHead) + num_parts(block) * sizeof(uint32_t), kPageBytes);
}

size_t BlockLayout::slot_offset(size_t slot) const {
    size_t offset = slots_offset;
    for (size_t index = 0; index < class_of_slot[slot]; ++index)
        offset += classes[index].num_slots * classes[index].slot_bytes;
    const SizeClass& own = classes[class_of_slot[slot]];
    return offset + (slot - own.first_slot) * own.slot_bytes;
}

void write_header(const BlockLayout& layout, FileId id, std::byte* page) {
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    header.durable = layout.durable ? 1 : 0;
    header.part_bytes = layout.part_bytes;
    header.num_blocks = layout.block_bytes.size();
    header.file_bytes = layout.file_bytes;
    header.layout_hash = layout.hash;
    header.file_id = id.value;
    std::memset(page, 0, kPageBytes);
    std::memcpy(page, &header, sizeof header);
    header.checksum = checksum_without(page, kPageBytes, offsetof(Header, checksum));
    std::memcpy(page, &header, sizeof header);
}

std::string check_header(const BlockLayout& layout, const std::byte* page, FileId* id) {
    Header header{};
    std::memcpy(&header, page, sizeof header);
    if (std::memcmp(header.magic, kMagic, kMagicFamily) != 0)
        return "has no block file's header at offset 0";
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0)
        return join_text("is of another version of the format: the word at offset 0 begins with \"",
                         std::string(header.magic, strnlen(header.magic, sizeof header.magic)), "\", expected \"",
                         kMagic, '"');
    const uint32_t found = checksum_without(page, kPageBytes, offsetof(Header, checksum));
    if (found != header.checksum)
        return join_text("its header at offset 0 is damaged: checksum ", hex_text(found), ", expected ",
                         hex_text(header.checksum));
    if (header.durable == 0)
        return "is a scratch file: it ended with the process that wrote it (only a durable one can be opened again)";
    if (header.num_blocks != layout.block_bytes.size() || header.layout_hash != layout.hash ||
        header.file_bytes != layout.file_bytes)
        return join_text("holds another layout: ", header.num_blocks, " blocks in ", header.file_bytes,
                         " bytes (parts of ", header.part_bytes, "), expected ", layout.block_bytes.size(),
                         " blocks in ", layout.file_bytes, " (parts of ", layout.part_bytes, ")");
    id->value = header.file_id;
    return "";
}

void write_entry(const BlockLayout& layout, FileId id, size_t block, const MapEntry& entry, const uint32_t* checksums,
                 std::byte* pages) {
    const size_t num_bytes = layout.entry_bytes(block);
    EntryHead head{};
    std::memcpy(head.magic, kEntryMagic, sizeof kEntryMagic);
    head.num_parts = static_cast<uint32_t>(layout.num_parts(block));
    head.block = block;
    head.slot = entry.slot;
    head.generation = entry.generation;
    head.version = entry.version;
    head.layout_hash = layout.hash;
    head.file_id = id.value;
    std::memset(pages, 0, num_bytes);
    std::memcpy(pages, &head, sizeof head);
    if (head.num_parts > 0)
        std::memcpy(pages + sizeof head, checksums, head.num_parts * sizeof(uint32_t));
    head.checksum = checksum_without(pages, num_bytes, offsetof(EntryHead, checksum));
    std::memcpy(pages, &head, sizeof head);
}

bool read_entry(const BlockLayout& layout, FileId id, size_t block, const std::byte* pages, MapEntry* entry,
                uint32_t* checksums) {
    EntryHead head{};
    std::memcpy(&head, pages, sizeof head);
    if (std::memcmp(head.magic, kEntryMagic, sizeof kEntryMagic) != 0 || head.block != block ||
        head.num_parts != layout.num_parts(block) || head.layout_hash != layout.hash || head.file_id != id.value ||
        head.checksum != checksum_without(pages, layout.entry_bytes(block), offsetof(EntryHead, checksum)))
        return false;
    *entry = {head.generation, head.version, head.slot};
    if (head.num_parts > 0)
        std::memcpy(checksums, pages + sizeof head, head.num_parts * sizeof(uint32_t));
    return true;
}

} // namespace distzo2
