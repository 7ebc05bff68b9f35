// Python's HostPool, BlockFile and CopyEngine (distzo2_core._C) over csrc/runtime. Calls that may block release the
// GIL. Engines that are still open when the interpreter ends are closed by then, so that queued downloads are not lost.
#include <ATen/ops/from_blob.h>
#include <torch/csrc/utils/pybind.h>

#include <mutex>
#include <optional>

#include "runtime/device/driver.h"
#include "runtime/engine/copy_engine.h"
#include "runtime/pool/memory_budget.h"

namespace py = pybind11;

namespace distzo2 {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

at::Tensor tensor_over(std::shared_ptr<Arena> arena, std::byte* data, size_t num_bytes) {
    return at::from_blob(
        data, {static_cast<int64_t>(num_bytes)}, [arena = std::move(arena)](void*) {}, at::TensorOptions(at::kByte));
}

at::Tensor aligned_buffer(size_t num_bytes) {
    auto arena = std::make_shared<Arena>(num_bytes);
    std::byte* data = arena->data();
    return tensor_over(std::move(arena), data, num_bytes);
}

std::shared_ptr<HostPool> make_pool(std::vector<size_t> sizes, const std::string& device_name, std::optional<bool> pin,
                                    bool allow_pageable, int num_ranks, std::optional<size_t> cgroup_bytes,
                                    std::optional<size_t> available_bytes, std::optional<size_t> host_memory) {
    const py::gil_scoped_release unlocked; // here, since what pybind11 does after it needs the GIL
    auto device = make_device(device_name);
    HostPoolOptions options;
    options.pin = pin.value_or(!device->is_cpu());
    options.allow_pageable = allow_pageable;
    options.num_ranks = num_ranks;
    options.host_memory = host_memory.value_or(kUnlimited);
    options.between_chunks = [] { // a large pool takes a minute
        const py::gil_scoped_acquire locked;
        if (PyErr_CheckSignals() != 0)
            throw py::error_already_set();
    };
    if (cgroup_bytes || available_bytes) {
        options.machine = read_memory_budget(); // of the process itself: RLIMIT_MEMLOCK
        options.machine->cgroup_bytes = cgroup_bytes.value_or(kUnlimited);
        options.machine->available_bytes = available_bytes.value_or(kUnlimited);
    }
    return std::make_shared<HostPool>(std::move(sizes), std::move(device), options);
}

py::dict pool_stats(const HostPool& pool) {
    const HostPool::Stats stats = pool.stats();
    py::dict result;
    result["bytes_used"] = stats.bytes_used;
    result["bytes_padded"] = stats.bytes_padded;
    result["bytes_pinned"] = stats.bytes_pinned;
    result["chunks"] = stats.chunks;
    result["pin_error"] = stats.pin_error;
    result["numa_node"] = stats.numa_node;
    result["huge_pages"] = stats.huge_pages;
    result["touch_s"] = static_cast<double>(stats.touch_ns) * 1e-9;
    result["pin_s"] = static_cast<double>(stats.pin_ns) * 1e-9;
    return result;
}

// A file that Python may close while an engine still uses it.
struct PyBlockFile {
    std::shared_ptr<BlockFile> file;
    std::string path;
    BlockFile& get() const { return *shared(); }
    std::shared_ptr<BlockFile> shared() const {
        if (!file)
            throw std::runtime_error("block file " + path + ": is closed");
        return file;
    }
    void close(bool unlink) {
        if (file && unlink)
            file->unlink();
        file.reset();
    }
};

py::dict file_stats(const PyBlockFile& self) {
    const BlockFile::Stats stats = self.get().stats();
    py::dict result;
    result["direct"] = stats.direct;
    result["durable"] = stats.durable;
    result["direct_fallback"] = stats.fallback;
    result["preallocated"] = stats.preallocated;
    result["bytes_used"] = stats.bytes_used;
    result["bytes_padded"] = stats.bytes_padded;
    result["bytes_read"] = stats.bytes_read;
    result["bytes_written"] = stats.bytes_written;
    result["map_bytes_written"] = stats.map_bytes_written;
    result["spare_slots"] = stats.spare_slots;
    result["syncs"] = stats.syncs;
    return result;
}

struct PyRangeFiles {
    std::shared_ptr<RangeFiles> files;
    RangeFiles& get() const { return *shared(); }
    std::shared_ptr<RangeFiles> shared() const {
        if (!files)
            throw std::runtime_error("range files: are closed");
        return files;
    }
};

struct OpenEngines {
    std::mutex mutex;
    std::vector<std::weak_ptr<CopyEngine>> engines;
};

OpenEngines& open_engines() {
    static OpenEngines* instance = new OpenEngines; // outlives every engine
    return *instance;
}

void close_engines() {
    std::vector<std::weak_ptr<CopyEngine>> engines;
    {
        const std::lock_guard lock(open_engines().mutex);
        engines.swap(open_engines().engines);
    }
    for (const auto& weak : engines)
        if (const auto engine = weak.lock())
            engine->close();
}

std::shared_ptr<CopyEngine> remember(std::shared_ptr<CopyEngine> engine) {
    const std::lock_guard lock(open_engines().mutex);
    auto& engines = open_engines().engines;
    std::erase_if(engines, [](const auto& weak) { return weak.expired(); });
    engines.push_back(engine);
    return engine;
}

std::vector<std::byte*> to_pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<std::byte*> pointers;
    for (const uintptr_t address : addresses)
        pointers.push_back(reinterpret_cast<std::byte*>(address));
    return pointers;
}

Stream to_stream(uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

py::dict engine_stats(CopyEngine& engine) {
    EngineStats stats;
    {
        const py::gil_scoped_release unlocked;
        stats = engine.stats();
    }
    py::dict result;
    result["uploads"] = stats.uploads;
    result["downloads"] = stats.downloads;
    result["bytes_up"] = stats.bytes_up;
    result["bytes_down"] = stats.bytes_down;
    result["acquires"] = stats.acquires;
    result["hits"] = stats.hits;
    result["recalled_uploads"] = stats.recalled_uploads;
    result["recalled_downloads"] = stats.recalled_downloads;
    result["dropped_events"] = stats.dropped_events;
    result["upload_s"] = stats.upload_s;
    result["download_s"] = stats.download_s;
    result["wait_s"] = stats.wait_s;
    result["stall_s"] = stats.stall_s;
    return result;
}

py::list engine_events(CopyEngine& engine) {
    constexpr const char* kNames[] = {"upload", "download", "wait"};
    std::vector<TraceEvent> events;
    {
        const py::gil_scoped_release unlocked;
        events = engine.events();
    }
    py::list result;
    for (const TraceEvent& event : events)
        result.append(py::make_tuple(kNames[static_cast<int>(event.kind)], event.block, event.slot, event.num_bytes,
                                     event.start_ns, event.end_ns));
    return result;
}

py::dict memory_budget() {
    const MemoryBudget budget = read_memory_budget();
    const auto number = [](size_t num_bytes) -> py::object {
        return num_bytes == kUnlimited ? py::object(py::none()) : py::object(py::int_(num_bytes));
    };
    py::dict result;
    result["allowed_bytes"] = number(budget.allowed_bytes);
    result["cgroup_bytes"] = number(budget.cgroup_bytes);
    result["available_bytes"] = number(budget.available_bytes);
    result["memlock_bytes"] = number(budget.memlock_bytes);
    result["text"] = budget.text();
    return result;
}

void register_pool(py::module_& module) {
    py::class_<HostPool, std::shared_ptr<HostPool>>(module, "HostPool", R"(Host memory for blocks: one arena of zeros.

Its pages are touched in parallel, on the device's NUMA node where there is a choice. For a CUDA device they
are pinned in chunks of at most 1 GiB.

Args:
    sizes: bytes of each block; each block starts at a multiple of 4096.
    device: "cpu", "cuda" or "cuda:N", the device that the blocks travel to.
    pin: whether to pin; None pins for CUDA devices.
    allow_pageable: whether to use plain memory where pinning fails; stats()["pin_error"] then says
        why.
    num_ranks: processes on this machine that make such a pool; each may take its share of the memory.
    cgroup_bytes, available_bytes: what memory_budget() said before any of them made its pool; None reads it
        now.
    host_memory: bytes that all these processes may take together, in place of nine tenths of what is
        available. What a control group does not leave is refused all the same.

Raises:
    ValueError: no block, or an unknown device.
    RuntimeError: the memory budget or the pinning refuses the pool (each number is named), or the device is
        missing.)")
        .def(py::init(&make_pool), py::arg("sizes"), py::arg("device") = "cpu", py::arg("pin") = py::none(),
             py::arg("allow_pageable") = false, py::arg("num_ranks") = 1, py::arg("cgroup_bytes") = py::none(),
             py::arg("available_bytes") = py::none(), py::arg("host_memory") = py::none())
        .def("__len__", &HostPool::num_blocks, "The number of blocks.")
        .def(
            "address",
            [](const HostPool& self, size_t block) { return reinterpret_cast<uintptr_t>(self.address(block)); },
            py::arg("block"), R"(The address of the block's first byte, a multiple of 4096.

Raises IndexError for an unknown block, RuntimeError after close().)")
        .def("nbytes", &HostPool::num_bytes, py::arg("block"), "Bytes of the block. Raises IndexError.")
        .def(
            "tensor",
            [](const HostPool& self, size_t block) {
                return tensor_over(self.arena(), self.address(block), self.num_bytes(block));
            },
            py::arg("block"),
            R"(A uint8 CPU tensor [nbytes(block)] over the block's memory, which it keeps alive after close().

Raises IndexError for an unknown block, RuntimeError after close().)")
        .def("stats", &pool_stats, R"(What the pool takes.

bytes_used, bytes_padded, bytes_pinned; chunks: registrations; pin_error: "" or why it is not pinned;
numa_node: -1 where there is no choice; huge_pages: whether they were asked for; touch_s, pin_s: seconds in
which its pages were made present and pinned, which overlap.)")
        .def("close", &HostPool::close, Unlocked(),
             "Releases the memory. It is freed when no engine and no tensor holds it.");
}

void register_file(py::module_& module) {
    py::class_<PyBlockFile>(module, "BlockFile", R"(Weights on disk: one preallocated file of blocks, with checksums.

The file is read and written with O_DIRECT where its file system allows that. A block is replaced as a
whole: its new bytes go to a spare slot of the file, which then becomes the block. New blocks are zeros at
version 0. One process uses a file at a time; its threads may all call.

Args:
    path: of the file. One that exists must be a block file; create=True replaces it.
    sizes: bytes of each block; each slot starts at a multiple of 4096.
    create: True makes the file; False opens a durable one with the same sizes.
    direct: True demands O_DIRECT, False does without, None tries it and falls back
        (stats()["direct_fallback"]).
    durable: True commits each replacement with syncs, so that a crash at any byte leaves the block before
        or after it, and the file can be opened again. False makes a scratch file, which ends with this
        process.

Raises:
    RuntimeError: names the path, the offset and the cause: in use by another process, no space, another
        layout, damage.)")
        .def(py::init([](const std::string& path, std::vector<size_t> sizes, bool create, std::optional<bool> direct,
                         bool durable) {
                 const py::gil_scoped_release unlocked;
                 const BlockFileOptions options{.durable = durable};
                 return PyBlockFile{std::make_shared<BlockFile>(path, std::move(sizes), create, direct, options), path};
             }),
             py::arg("path"), py::arg("sizes"), py::arg("create") = true, py::arg("direct") = py::none(),
             py::arg("durable") = false)
        .def_readonly("path", &PyBlockFile::path, "The path that the file was opened with.")
        .def(
            "__len__", [](const PyBlockFile& self) { return self.get().block_bytes().size(); }, "The number of blocks.")
        .def(
            "read",
            [](const PyBlockFile& self, size_t block, uintptr_t address, size_t nbytes, size_t offset) {
                self.get().read(block, reinterpret_cast<void*>(address), nbytes, offset);
            },
            py::arg("block"), py::arg("address"), py::arg("nbytes"), py::arg("offset") = 0, Unlocked(),
            R"(Reads bytes [offset, offset + nbytes) of a block to memory at `address`, of any alignment.

Raises IndexError for a range outside the block, RuntimeError for a failed read or a checksum that differs.)")
        .def(
            "write",
            [](const PyBlockFile& self, size_t block, uintptr_t address, size_t nbytes, size_t offset,
               std::optional<int64_t> version) {
                self.get().write(block, reinterpret_cast<const void*>(address), nbytes, offset, version);
            },
            py::arg("block"), py::arg("address"), py::arg("nbytes"), py::arg("offset") = 0,
            py::arg("version") = py::none(), Unlocked(),
            R"(Replaces bytes [offset, offset + nbytes) of a block from memory at `address`; the rest is copied.

The block gets `version`; None keeps its version. In a durable file the block is on the disk on return. A
block that an engine has on its way must not be written. Raises IndexError, RuntimeError.)")
        .def(
            "version", [](const PyBlockFile& self, size_t block) { return self.get().version(block); },
            py::arg("block"), "The version that the block was last replaced with. Raises IndexError.")
        .def(
            "verify", [](const PyBlockFile& self) { return self.get().verify(); }, Unlocked(),
            "Reads every block against its checksums; returns the bytes read. Raises RuntimeError naming the first "
            "damage.")
        .def(
            "sync", [](const PyBlockFile& self) { self.get().sync(); }, Unlocked(),
            "Returns when all that was written is on the disk (fdatasync). Raises RuntimeError.")
        .def("stats", &file_stats, R"(What the file takes and has done.

direct, direct_fallback: whether O_DIRECT is in use, and why not; durable; preallocated; spare_slots;
bytes_used and bytes_padded: of the blocks, and of the file; bytes_read, bytes_written, map_bytes_written,
syncs: since it was opened.)")
        .def_static(
            "file_bytes",
            [](std::vector<size_t> sizes, bool durable) {
                return BlockLayout(std::move(sizes), BlockFileOptions{}.part_bytes, durable).file_bytes;
            },
            py::arg("sizes"), py::arg("durable") = false, "Bytes that a file of such blocks takes on the disk.")
        .def("close", &PyBlockFile::close, py::arg("unlink") = false, Unlocked(),
             "Closes the file, and removes its name with unlink=True. An engine that uses the file keeps it open.");
}

void register_ranges(py::module_& module) {
    using Row = std::tuple<size_t, size_t, size_t, size_t>;
    py::class_<PyRangeFiles>(module, "RangeFiles",
                             R"(Blocks that are ranges of files as they lie there, which are only read.

So a frozen model streams from its checkpoint's own files. Files are read with O_DIRECT where their file
system allows that, through a buffer of 1 MiB a thread.

Args:
    paths: of the files.
    sizes: bytes of each block.
    ranges: for each block, in the order of their places, (index of the file, offset in it, bytes, place in
        the block). What is between them is zeros.
    direct: True demands O_DIRECT, False does without, None tries it and falls back
        (stats()["direct_fallback"]).

Raises:
    ValueError: a range does not fit its block, or names no file.
    RuntimeError: names a file that cannot be opened, or that is shorter than its ranges.)")
        .def(py::init([](std::vector<std::string> paths, std::vector<size_t> sizes,
                         const std::vector<std::vector<Row>>& ranges, std::optional<bool> direct) {
                 std::vector<std::vector<FileRange>> blocks(ranges.size());
                 for (size_t i = 0; i < ranges.size(); ++i)
                     for (const auto& [file, offset, num_bytes, place] : ranges[i])
                         blocks[i].push_back({file, offset, num_bytes, place});
                 const py::gil_scoped_release unlocked;
                 return PyRangeFiles{
                     std::make_shared<RangeFiles>(std::move(paths), std::move(sizes), std::move(blocks), direct)};
             }),
             py::arg("paths"), py::arg("sizes"), py::arg("ranges"), py::arg("direct") = py::none())
        .def(
            "__len__", [](const PyRangeFiles& self) { return self.get().block_bytes().size(); },
            "The number of blocks.")
        .def(
            "read",
            [](const PyRangeFiles& self, size_t block, uintptr_t address, size_t nbytes, size_t offset) {
                self.get().read(block, reinterpret_cast<void*>(address), nbytes, offset);
            },
            py::arg("block"), py::arg("address"), py::arg("nbytes"), py::arg("offset") = 0, Unlocked(),
            R"(Reads bytes [offset, offset + nbytes) of a block to memory at `address`, of any alignment.

Raises IndexError for a range outside the block, RuntimeError for a failed read.)")
        .def(
            "stats",
            [](const PyRangeFiles& self) {
                const RangeFiles::Stats stats = self.get().stats();
                py::dict result;
                result["direct"] = stats.direct;
                result["direct_fallback"] = stats.fallback;
                result["bytes_used"] = stats.bytes_used;
                result["bytes_read"] = stats.bytes_read;
                return result;
            },
            R"(What the files give.

direct, direct_fallback: whether O_DIRECT is in use for all of them, and why not; bytes_used: of the blocks;
bytes_read: since they were opened.)")
        .def(
            "close", [](PyRangeFiles& self) { self.files.reset(); }, Unlocked(),
            "Closes the files. An engine that uses them keeps them open.");
}

// Three constructors differ in their source.
template <class Source, class Make>
auto engine_init(Make make) {
    return py::init([make](const std::string& device, const Source& source,
                           const std::vector<uintptr_t>& slot_addresses, size_t slot_bytes,
                           const std::optional<std::shared_ptr<HostPool>>& staging, uintptr_t stream) {
        const py::gil_scoped_release unlocked;
        return remember(make(make_device(device), source, to_pointers(slot_addresses), slot_bytes,
                             staging.value_or(nullptr), to_stream(stream)));
    });
}

void register_engine(py::module_& module) {
    const auto over_pool = [](auto device, const auto& pool, auto slots, size_t slot_bytes, const auto& /*staging*/,
                              Stream stream) {
        return std::make_shared<CopyEngine>(std::move(device), *pool, std::move(slots), slot_bytes, stream);
    };
    const auto over_file = [](auto device, const auto& file, auto slots, size_t slot_bytes, const auto& staging,
                              Stream stream) {
        return std::make_shared<CopyEngine>(std::move(device), file.shared(), std::move(slots), slot_bytes, staging,
                                            DiskOptions{}, stream);
    };
    const auto over_ranges = [](auto device, const auto& source, auto slots, size_t slot_bytes, const auto& staging,
                                Stream stream) {
        const auto& [file, ranges] = source;
        return std::make_shared<CopyEngine>(std::move(device), file ? file->shared() : nullptr, std::move(slots),
                                            slot_bytes, staging, DiskOptions{}, stream, ranges.shared());
    };
    py::class_<CopyEngine, std::shared_ptr<CopyEngine>>(module, "CopyEngine", R"(Brings blocks to slots and back.

A block comes from a HostPool or from files into a slot: memory of the caller's on `device`. acquire()
gives the block's slot; release() ends the use and, if the block was changed, stores it. On a CPU the
calling thread is the stream, and calls wait. On CUDA nothing but flush() waits: `stream`, a handle such as
torch.cuda.current_stream().cuda_stream, waits in the host's place. The first transfer that fails is raised
(RuntimeError) by every later call. Any thread may call.

Args:
    device: "cpu", "cuda" or "cuda:N".
    source: where the blocks are: a HostPool, a BlockFile, or a pair of a BlockFile or None and RangeFiles,
        whose blocks follow those of the first and are never released dirty. It may be closed afterwards; the
        engine keeps what it needs.
    slot_addresses: addresses on `device`, at least two, which must stay valid until close(). For a CPU over
        a file they must be multiples of 4096 (aligned_buffer).
    slot_bytes: bytes of a slot, at least those of the largest block.
    staging: for CUDA over a file, a pinned pool to copy through; None makes one.
    stream: on CUDA, transfers wait for what is on it now, which may still use the slots' memory.

Raises:
    ValueError: too few slots, slots that are too small or misaligned, an unknown device.
    RuntimeError: the device is missing, or a thread, stream or event cannot be made.)")
        .def(engine_init<std::shared_ptr<HostPool>>(over_pool), py::arg("device"), py::arg("source").none(false),
             py::arg("slot_addresses"), py::arg("slot_bytes"), py::arg("staging") = py::none(), py::arg("stream") = 0)
        .def(engine_init<PyBlockFile>(over_file), py::arg("device"), py::arg("source").none(false),
             py::arg("slot_addresses"), py::arg("slot_bytes"), py::arg("staging") = py::none(), py::arg("stream") = 0)
        .def(engine_init<std::pair<std::optional<PyBlockFile>, PyRangeFiles>>(over_ranges), py::arg("device"),
             py::arg("source").none(false), py::arg("slot_addresses"), py::arg("slot_bytes"),
             py::arg("staging") = py::none(), py::arg("stream") = 0)
        .def("prefetch", &CopyEngine::prefetch, py::arg("block"), Unlocked(),
             R"(Starts an upload of the block, unless it is present or on its way.

Returns False where no slot can be taken now. Raises IndexError, RuntimeError.)")
        .def(
            "acquire",
            [](CopyEngine& self, int block, uintptr_t stream) { return self.acquire(block, to_stream(stream)); },
            py::arg("block"), py::arg("stream") = 0, Unlocked(),
            R"(The index of the slot that holds the block until release().

On a CPU the block is there on return; on CUDA `stream` waits for it. A block may be acquired several times;
each needs its release. Raises IndexError, and RuntimeError where every slot is acquired or a transfer has
failed.)")
        .def(
            "release",
            [](CopyEngine& self, int block, uintptr_t stream, bool dirty, int64_t version) {
                self.release(block, to_stream(stream), dirty, version);
            },
            py::arg("block"), py::arg("stream") = 0, py::arg("dirty") = false, py::arg("version") = 0, Unlocked(),
            R"(Ends a use of the block by what was issued on `stream` so far.

dirty: the block was changed, and is stored after its last release. In a file that happens once
set_durable() has been called with at least `version`, which becomes the block's version there. Raises
IndexError, and RuntimeError where the block is not acquired or a transfer has failed.)")
        .def("set_durable", &CopyEngine::set_durable, py::arg("version"), Unlocked(),
             R"(Lets blocks with versions up to `version` reach the file (the write-ahead rule).

Call it when the journal lines before `version` are on disk. Blocks in a HostPool do not wait for it.)")
        .def("set_tails", &CopyEngine::set_tails, py::arg("num_bytes"), Unlocked(),
             R"(Says how many bytes at the end of each block of a HostPool are only read, and so never stored.

To be called before blocks are released. Raises ValueError unless there is one for each block, and none is longer.)")
        .def("fail", &CopyEngine::fail, py::arg("reason"), Unlocked(),
             "Makes every call that waits, and every later one, raise RuntimeError(reason).")
        .def("drop", &CopyEngine::drop, py::arg("block"), Unlocked(),
             R"(Forgets the block's copy in a slot, so that the next acquire() uploads it again.

For a block that was written in its source. Raises IndexError, and RuntimeError where the block is acquired.)")
        .def("present", &CopyEngine::present, Unlocked(), "The blocks whose upload is complete, ascending.")
        .def("flush", &CopyEngine::flush, Unlocked(),
             "Waits until every block that was released dirty is stored. Raises RuntimeError where that fails.")
        .def("stats", &engine_stats, R"(Counters since the start or reset_stats().

uploads, downloads, bytes_up, bytes_down: begun; acquires; hits: of those, blocks that were present or on
their way; recalled_uploads, recalled_downloads: taken back before they began; dropped_events: of the trace.
Seconds: upload_s and download_s over the transfers, wait_s that the host was blocked in acquire(), stall_s
that streams waited for uploads (CUDA).)")
        .def("reset_stats", &CopyEngine::reset_stats, Unlocked(), "Sets all counters to 0.")
        .def("trace", &CopyEngine::trace, py::arg("enable"), Unlocked(),
             "Starts an empty trace of transfers, of the last 65536, or stops it.")
        .def("events", &engine_events, R"(The trace, oldest first.

A tuple for each transfer: (kind, block, slot, bytes, start_ns, end_ns), kind being "upload", "download" or
"wait" (compute stood still for the block), times as of time.monotonic_ns().)")
        .def("close", &CopyEngine::close, Unlocked(),
             R"(Ends what is under way, and stores what was released dirty as far as set_durable() allows.

Later calls that move blocks raise RuntimeError.)");
}

} // namespace

void register_runtime(py::module_& module) {
    distzo2::register_pool(module);
    distzo2::register_file(module);
    distzo2::register_ranges(module);
    distzo2::register_engine(module);
    module.def(
        "aligned_buffer", &distzo2::aligned_buffer, py::arg("nbytes"),
        "A uint8 CPU tensor [nbytes] of zeros whose memory starts at a multiple of 4096: a slot of a CopyEngine.");
    module.def(
        "cuda_available", &distzo2::cu::available, py::call_guard<py::gil_scoped_release>(),
        R"(Whether there is a CUDA driver with a device, and why not: (True, an empty text) or (False, reason).)");
    module.def("memory_budget", &distzo2::memory_budget, R"(Host memory that this process may still take.

allowed_bytes: 90% of the least of cgroup_bytes (what its control groups leave) and available_bytes (what
the machine has available); memlock_bytes: what it may pin; text: all of them in words. Bytes; None where
there is no limit.)");
    module.def("arenas_made", &distzo2::Arena::num_made,
               R"(How often this process has mapped memory for a pool or a buffer.

In the steady state of a training it does not rise.)");
    py::module_::import("atexit").attr("register")(
        py::cpp_function([] { distzo2::close_engines(); }, py::call_guard<py::gil_scoped_release>()));
}

} // namespace distzo2
