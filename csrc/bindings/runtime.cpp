// Python's HostPool, BlockFile and CopyEngine (distzo2_core._C) over csrc/runtime. Whatever may block lets go of the
// GIL. Engines that are still open when the interpreter ends are closed by then, so that queued downloads are not lost.
#include <ATen/ops/from_blob.h>
#include <torch/csrc/utils/pybind.h>

#include <mutex>
#include <optional>

#include "runtime/copy_engine.h"
#include "runtime/driver.h"
#include "runtime/memory_budget.h"

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
                                    std::optional<size_t> available_bytes) {
    const py::gil_scoped_release unlocked; // here, since what pybind11 does after it needs the GIL
    auto device = make_device(device_name);
    HostPoolOptions options;
    options.pin = pin.value_or(!device->is_cpu());
    options.allow_pageable = allow_pageable;
    options.num_ranks = num_ranks;
    if (cgroup_bytes || available_bytes) {
        options.machine = read_memory_budget(); // of the process itself: RLIMIT_MEMLOCK
        options.machine->cgroup_bytes = cgroup_bytes.value_or(kUnlimited);
        options.machine->available_bytes = available_bytes.value_or(kUnlimited);
        options.machine->limit_to_these();
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
    return result;
}

// A file that Python may close while an engine goes on using it.
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
    result["reads_by"] = stats.reads_by;
    result["reads_fallback"] = stats.reads_fallback;
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
    py::class_<HostPool, std::shared_ptr<HostPool>>(module, "HostPool",
                                                    "Host memory for blocks of the given sizes (bytes): one arena, "
                                                    "pages touched in parallel, pinned for a CUDA device\n"
                                                    "in chunks of at most 1 GiB; num_ranks pools like it share what "
                                                    "the machine has: now, or what memory_budget()\n"
                                                    "said before any of them was made (cgroup_bytes, available_bytes). "
                                                    "RuntimeError when the memory budget or the\n"
                                                    "pinning refuses it, naming each number.")
        .def(py::init(&make_pool), py::arg("sizes"), py::arg("device") = "cpu", py::arg("pin") = py::none(),
             py::arg("allow_pageable") = false, py::arg("num_ranks") = 1, py::arg("cgroup_bytes") = py::none(),
             py::arg("available_bytes") = py::none())
        .def("__len__", &HostPool::num_blocks)
        .def(
            "address",
            [](const HostPool& self, size_t block) { return reinterpret_cast<uintptr_t>(self.address(block)); },
            py::arg("block"), "Address of the block's first byte, a multiple of 4096.")
        .def("nbytes", &HostPool::num_bytes, py::arg("block"), "Bytes of the block.")
        .def(
            "tensor",
            [](const HostPool& self, size_t block) {
                return tensor_over(self.arena(), self.address(block), self.num_bytes(block));
            },
            py::arg("block"),
            "uint8 CPU tensor [nbytes] over the block; it keeps the memory alive, also after close().")
        .def("stats", &pool_stats,
             "bytes_used, bytes_padded, bytes_pinned, chunks, pin_error, numa_node (-1: no choice), huge_pages.")
        .def("close", &HostPool::close, Unlocked(),
             "Lets go of the memory; it is given back when no engine or tensor holds it either.");
}

void register_file(py::module_& module) {
    py::class_<PyBlockFile>(
        module, "BlockFile",
        "A preallocated file of blocks of the given sizes (bytes), each at a multiple of 4096 and with checksums, "
        "read\n"
        "and written with O_DIRECT where the file system allows it (direct=True demands it, False does without). A "
        "block\n"
        "is replaced as a whole, in a spare place. durable=True: each replacement is on the disk when it has ended, a\n"
        "crash at any byte leaves the block before or after it, and create=False opens the file again. Otherwise it "
        "is\n"
        "scratch space of this process. New blocks are zeros at version 0. RuntimeError naming path, offset and cause.")
        .def(py::init([](const std::string& path, std::vector<size_t> sizes, bool create, std::optional<bool> direct,
                         bool durable) {
                 const py::gil_scoped_release unlocked;
                 const BlockFileOptions options{.durable = durable};
                 return PyBlockFile{std::make_shared<BlockFile>(path, std::move(sizes), create, direct, options), path};
             }),
             py::arg("path"), py::arg("sizes"), py::arg("create") = true, py::arg("direct") = py::none(),
             py::arg("durable") = false)
        .def_readonly("path", &PyBlockFile::path)
        .def("__len__", [](const PyBlockFile& self) { return self.get().block_bytes().size(); })
        .def(
            "read",
            [](const PyBlockFile& self, size_t block, uintptr_t address, size_t nbytes, size_t offset) {
                self.get().read(block, reinterpret_cast<void*>(address), nbytes, offset);
            },
            py::arg("block"), py::arg("address"), py::arg("nbytes"), py::arg("offset") = 0, Unlocked(),
            "Read nbytes of the block from `offset` to memory, any size and alignment.")
        .def(
            "write",
            [](const PyBlockFile& self, size_t block, uintptr_t address, size_t nbytes, size_t offset,
               std::optional<int64_t> version) {
                self.get().write(block, reinterpret_cast<const void*>(address), nbytes, offset, version);
            },
            py::arg("block"), py::arg("address"), py::arg("nbytes"), py::arg("offset") = 0,
            py::arg("version") = py::none(), Unlocked(),
            "Replace nbytes of the block at `offset` from memory, any size and alignment; the rest of it is copied. It "
            "gets\n"
            "`version`, or keeps its own.")
        .def(
            "version", [](const PyBlockFile& self, size_t block) { return self.get().version(block); },
            py::arg("block"), "Version that the block was last replaced with.")
        .def(
            "verify", [](const PyBlockFile& self) { return self.get().verify(); }, Unlocked(),
            "Read every block against its checksums; bytes read. RuntimeError naming the first part that is not what "
            "was written.")
        .def(
            "sync", [](const PyBlockFile& self) { self.get().sync(); }, Unlocked(), "fdatasync.")
        .def("stats", &file_stats,
             "direct, direct_fallback (why not), durable, preallocated, bytes_used, bytes_padded (of the file), "
             "bytes_read,\n"
             "bytes_written (of blocks), map_bytes_written (beside them), spare_slots, syncs.")
        .def_static(
            "file_bytes",
            [](std::vector<size_t> sizes, bool durable) {
                return BlockLayout(std::move(sizes), BlockFileOptions{}.part_bytes, durable).file_bytes;
            },
            py::arg("sizes"), py::arg("durable") = false, "Bytes that a file of such blocks takes on the disk.")
        .def("close", &PyBlockFile::close, py::arg("unlink") = false, Unlocked(),
             "Lets go of the file, and removes its name if asked; an engine that uses it goes on.");
}

void register_engine(py::module_& module) {
    py::class_<CopyEngine, std::shared_ptr<CopyEngine>>(module, "CopyEngine",
                                                        "Brings blocks of a HostPool or BlockFile to slots on `device` "
                                                        "(\"cpu\", \"cuda:N\") and back. slot_addresses: at\n"
                                                        "least two, of slot_bytes each; the memory is the caller's and "
                                                        "must outlive close(). A failed transfer is raised\n"
                                                        "(RuntimeError) by every later call.")
        .def(py::init([](const std::string& device, const std::shared_ptr<HostPool>& source,
                         const std::vector<uintptr_t>& slot_addresses, size_t slot_bytes,
                         const std::shared_ptr<HostPool>& /*staging*/) {
                 const py::gil_scoped_release unlocked;
                 return remember(std::make_shared<CopyEngine>(make_device(device), *source, to_pointers(slot_addresses),
                                                              slot_bytes));
             }),
             py::arg("device"), py::arg("source").none(false), py::arg("slot_addresses"), py::arg("slot_bytes"),
             py::arg("staging") = std::shared_ptr<HostPool>())
        .def(py::init([](const std::string& device, const PyBlockFile& source,
                         const std::vector<uintptr_t>& slot_addresses, size_t slot_bytes,
                         const std::shared_ptr<HostPool>& staging) {
                 const py::gil_scoped_release unlocked;
                 return remember(std::make_shared<CopyEngine>(make_device(device), source.shared(),
                                                              to_pointers(slot_addresses), slot_bytes, staging));
             }),
             py::arg("device"), py::arg("source").none(false), py::arg("slot_addresses"), py::arg("slot_bytes"),
             py::arg("staging") = std::shared_ptr<HostPool>())
        .def("prefetch", &CopyEngine::prefetch, py::arg("block"), Unlocked(),
             "Start an upload unless the block is present or on its way; False if no slot can be taken now.")
        .def(
            "acquire",
            [](CopyEngine& self, int block, uintptr_t stream) { return self.acquire(block, to_stream(stream)); },
            py::arg("block"), py::arg("stream") = 0, Unlocked(),
            "Slot of the block, the block's until released. On a CPU it is present on return; on CUDA `stream` waits.")
        .def(
            "release",
            [](CopyEngine& self, int block, uintptr_t stream, bool dirty, int64_t version) {
                self.release(block, to_stream(stream), dirty, version);
            },
            py::arg("block"), py::arg("stream") = 0, py::arg("dirty") = false, py::arg("version") = 0, Unlocked(),
            "End a use of the block on `stream`. dirty: it was changed and is stored, in a file once the journal is "
            "durable\n"
            "up to `version`.")
        .def("set_durable", &CopyEngine::set_durable, py::arg("version"), Unlocked(),
             "Journal lines before `version` are on disk.")
        .def("fail", &CopyEngine::fail, py::arg("reason"), Unlocked(),
             "What waits, or is called from now on, raises RuntimeError(reason).")
        .def("drop", &CopyEngine::drop, py::arg("block"), Unlocked(), "Forget a present copy of the block.")
        .def("present", &CopyEngine::present, Unlocked(), "Blocks whose upload is complete.")
        .def("flush", &CopyEngine::flush, Unlocked(), "Wait until every queued download has ended.")
        .def("stats", &engine_stats,
             "Counters; *_s are seconds, wait_s what the host was blocked in acquire. reads_by: of a file, io_uring or "
             "threads\n"
             "(reads_fallback: why), as the environment's DISTZO2_DISK_READS names it.")
        .def("reset_stats", &CopyEngine::reset_stats, Unlocked())
        .def("trace", &CopyEngine::trace, py::arg("enable"), Unlocked(), "Start (empty) or stop the trace of tickets.")
        .def("events", &engine_events,
             "(kind, block, slot, bytes, start_ns, end_ns) per ticket, on time.monotonic_ns().")
        .def("close", &CopyEngine::close, Unlocked(),
             "End what is in flight; queued downloads that may be made are made.");
}

} // namespace

void register_runtime(py::module_& module) {
    distzo2::register_pool(module);
    distzo2::register_file(module);
    distzo2::register_engine(module);
    module.def("aligned_buffer", &distzo2::aligned_buffer, py::arg("nbytes"),
               "uint8 CPU tensor [nbytes] whose memory starts at a multiple of 4096; zeros.");
    module.def("cuda_available", &distzo2::cu::available, py::call_guard<py::gil_scoped_release>(),
               "(True, \"\") where a CUDA driver and a device are, else (False, reason).");
    module.def("memory_budget", &distzo2::memory_budget,
               "Host memory that may still be taken, and the limits behind it (bytes; None: no limit).");
    module.def(
        "arenas_made", &distzo2::Arena::num_made,
        "How often this process has mapped host memory for a pool or an aligned buffer: in the steady state, no more.");
    py::module_::import("atexit").attr("register")(
        py::cpp_function([] { distzo2::close_engines(); }, py::call_guard<py::gil_scoped_release>()));
}

} // namespace distzo2
