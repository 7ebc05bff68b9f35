// What the runtime's tests share: patterned blocks that tell block, version and place apart, slots, a scratch
// directory.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

#include "runtime/engine/copy_engine.h"

using distzo2::kPageBytes;

// Byte i of a block at a version; no two of (block, version) share a run of bytes, and no byte run is 0xFF (the
// poison).
inline uint8_t pattern(int block, int64_t version, size_t i) {
    uint64_t x = (static_cast<uint64_t>(block) << 40) + (static_cast<uint64_t>(version) << 20) + i / 8 + 1;
    x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15ull;
    return static_cast<uint8_t>((x >> (8 * (i % 8))) % 255);
}

inline void fill(std::byte* memory, int block, int64_t version, size_t num_bytes) {
    for (size_t i = 0; i < num_bytes; ++i)
        memory[i] = static_cast<std::byte>(pattern(block, version, i));
}

// Index of the first byte that differs, or num_bytes. Looks at every `stride`-th byte, and the last.
inline size_t first_difference(const std::byte* memory, int block, int64_t version, size_t num_bytes,
                               size_t stride = 1) {
    for (size_t i = 0; i < num_bytes; i += stride)
        if (memory[i] != static_cast<std::byte>(pattern(block, version, i)))
            return i;
    if (num_bytes > 0 && memory[num_bytes - 1] != static_cast<std::byte>(pattern(block, version, num_bytes - 1)))
        return num_bytes - 1;
    return num_bytes;
}

// A block of a file is replaced by its bytes at a version, which becomes the file's too.
inline void write_block(distzo2::BlockFile& file, int block, int64_t version, size_t num_bytes) {
    std::vector<std::byte> memory(num_bytes);
    fill(memory.data(), block, version, num_bytes);
    file.write(static_cast<size_t>(block), memory.data(), num_bytes, 0, version);
}

inline bool holds(distzo2::BlockFile& file, int block, int64_t version, size_t num_bytes) {
    std::vector<std::byte> memory(num_bytes);
    file.read(static_cast<size_t>(block), memory.data(), num_bytes, 0);
    return first_difference(memory.data(), block, version, num_bytes) == num_bytes;
}

// Where in a file a block of 64 bytes or more at this version begins.
inline size_t offset_in_file(const std::string& path, int block, int64_t version) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::string first(64, '\0');
    fill(reinterpret_cast<std::byte*>(first.data()), block, version, first.size());
    return bytes.find(first);
}

class ScratchDirectory {
  public:
    ScratchDirectory() {
        std::string name = (std::filesystem::temp_directory_path() / "distzo2-test-XXXXXX").string();
        if (mkdtemp(name.data()) == nullptr)
            throw std::runtime_error("no scratch directory");
        path_ = name;
    }
    ~ScratchDirectory() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    std::string file(const std::string& name) const { return (path_ / name).string(); }

  private:
    std::filesystem::path path_;
};

struct Slots {
    Slots(int num_slots, size_t num_bytes) : slot_bytes(distzo2::align_up(num_bytes, kPageBytes)) {
        for (int i = 0; i < num_slots; ++i) {
            arenas.push_back(std::make_unique<distzo2::Arena>(slot_bytes));
            std::memset(arenas.back()->data(), 0xFF, slot_bytes);
            addresses.push_back(arenas.back()->data());
        }
    }
    size_t slot_bytes;
    std::vector<std::unique_ptr<distzo2::Arena>> arenas;
    std::vector<std::byte*> addresses;
};

inline void sleep_us(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

// Sleeps up to `max_us`, every other time not at all; one generator a thread.
inline void random_delay(int max_us) {
    thread_local std::minstd_rand generator(
        static_cast<unsigned>(std::hash<std::thread::id>()(std::this_thread::get_id())));
    if (max_us > 0 && generator() % 2 == 0)
        sleep_us(static_cast<int>(generator() % static_cast<unsigned>(max_us)));
}

// Opens the gate some time after it is asked to, as the journal's thread does.
class Journal {
  public:
    Journal(distzo2::CopyEngine& engine, int max_delay_us)
        : thread_([this, &engine, max_delay_us] {
              while (!done_.load()) {
                  const int64_t wanted = wanted_.load();
                  sleep_us(1);
                  random_delay(2 * max_delay_us);
                  durable.store(wanted);
                  engine.set_durable(wanted);
              }
          }) {}
    ~Journal() {
        done_.store(true);
        thread_.join();
    }
    void append(int64_t version) { wanted_.store(version); }
    std::atomic<int64_t> durable{0};

  private:
    std::atomic<int64_t> wanted_{0};
    std::atomic<bool> done_{false};
    std::thread thread_;
};
