// CRC-32C (Castagnoli), the checksum of blocks in files: by the processor's own instruction where there is one (x86-64
// with SSE4.2), else by tables. Host only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distzo2 {

// Of `num_bytes` at `data`, continuing the checksum of what came before (0 at the start).
uint32_t crc32c(const void* data, size_t num_bytes, uint32_t before = 0);

// The two ways, for tests; has_crc32c_instruction() says whether the first may be called.
uint32_t crc32c_by_instruction(const void* data, size_t num_bytes, uint32_t before = 0);
uint32_t crc32c_by_tables(const void* data, size_t num_bytes, uint32_t before = 0);
bool has_crc32c_instruction();

} // namespace distzo2
