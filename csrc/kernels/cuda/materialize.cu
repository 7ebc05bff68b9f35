// The CUDA entries of kernels.h. One launch a visit, whatever its number of segments: its tables travel in the kernel's
// parameters when they fit, else in a workspace that is allocated, filled, read and freed in the order of the caller's
// stream. Nothing here waits for the device, and all work is on the caller's stream.
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>

#include "common/check.h"
#include "kernels/cuda/lookup_device.h"
#include "kernels/cuda/visit_device.h"
#include "kernels/visits.h"

namespace distzo2 {
namespace {

constexpr size_t kInlineBytes = 3840; // a kernel's parameters may be 4096 bytes on every driver
constexpr int kMaxDevices = 64;

struct InlineTables {
    VisitHeader header;
    alignas(16) uint8_t bytes[kInlineBytes];
};
static_assert(sizeof(InlineTables) <= 4096);

struct WorkspaceTables {
    VisitHeader header;
    const uint8_t* bytes;
};

template <class Program, class Tables>
__global__ void __launch_bounds__(kThreads, Program::kMinBlocks) visit_kernel(const __grid_constant__ Tables tables) {
    run_thread<Program>(tables.header, TableReader{tables.bytes}, blockIdx.x, threadIdx.x);
}

template <DType D, class Matrix>
__global__ void __launch_bounds__(kThreads)
    generate_kernel(const __grid_constant__ InPlace request, const __grid_constant__ PhiloxKeys keys,
                    uint32_t octets_per_thread, Matrix matrix) {
    generate_thread<D>(request, keys, octets_per_thread, blockIdx.x, threadIdx.x, matrix);
}

template <DType D, bool kMixed, class Matrix>
__global__ void __launch_bounds__(kThreads)
    lookup_kernel(const __grid_constant__ Lookup request, const __grid_constant__ PhiloxKeys keys, Matrix matrix) {
    lookup_thread<D, kMixed>(request, keys, blockIdx.x, threadIdx.x, blockDim.x, matrix);
}

// body(std::integral_constant<DType, dtype>), of a dtype.
template <class Body>
void with_dtype(DType dtype, Body body) {
    if (dtype == DType::kFp32)
        body(std::integral_constant<DType, DType::kFp32>{});
    else if (dtype == DType::kBf16)
        body(std::integral_constant<DType, DType::kBf16>{});
    else
        body(std::integral_constant<DType, DType::kFp16>{});
}

// A piece of the tables, carried by the parameters of a launch: ordered on the stream without a host copy that could
// outlive us.
struct Piece {
    alignas(16) uint8_t bytes[kInlineBytes];
};

__global__ void __launch_bounds__(kThreads)
    store_piece_kernel(uint8_t* to, const __grid_constant__ Piece piece, uint32_t num) {
    for (uint32_t i = threadIdx.x * 16; i < num; i += kThreads * 16)
        *reinterpret_cast<Sixteen*>(to + i) = *reinterpret_cast<const Sixteen*>(piece.bytes + i);
}

struct DeviceState {
    std::once_flag once, pool_once;
    int num_sms = 0;
    int has_pools = 0;
    cudaMemPool_t pool = nullptr; // keeps what it has, so that a workspace costs no allocation after the first
};

// Of the current device, which must be `device`. To make it current here would make a context, if only on the device to
// return to.
DeviceState& device_state(int device) {
    static DeviceState states[kMaxDevices];
    int current = -1;
    DZO_CUDA_CHECK(cudaGetDevice(&current));
    DZO_CHECK(device == current && device < kMaxDevices, "device ", device, " while ", current, " is current");
    DeviceState& state = states[device];
    std::call_once(state.once, [&] {
        DZO_CUDA_CHECK(cudaDeviceGetAttribute(&state.num_sms, cudaDevAttrMultiProcessorCount, device));
        DZO_CUDA_CHECK(cudaDeviceGetAttribute(&state.has_pools, cudaDevAttrMemoryPoolsSupported, device));
    });
    return state;
}

// Device memory in the order of a stream. A device without memory pools waits for the stream before it frees.
class Workspace {
  public:
    Workspace(size_t num_bytes, DeviceState& state, int device, cudaStream_t stream) : state_(state), stream_(stream) {
        if (state.has_pools == 0) {
            DZO_CUDA_CHECK(cudaMalloc(&data, num_bytes));
            return;
        }
        std::call_once(state.pool_once, [&] {
            cudaMemPoolProps properties{};
            properties.allocType = cudaMemAllocationTypePinned;
            properties.location.type = cudaMemLocationTypeDevice;
            properties.location.id = device;
            DZO_CUDA_CHECK(cudaMemPoolCreate(&state.pool, &properties));
            uint64_t keep = UINT64_MAX;
            DZO_CUDA_CHECK(cudaMemPoolSetAttribute(state.pool, cudaMemPoolAttrReleaseThreshold, &keep));
        });
        DZO_CUDA_CHECK(cudaMallocFromPoolAsync(&data, num_bytes, state.pool, stream));
    }
    ~Workspace() {
        if (state_.has_pools != 0) {
            cudaFreeAsync(data, stream_);
        } else {
            cudaStreamSynchronize(stream_);
            cudaFree(data);
        }
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    void* data = nullptr;

  private:
    DeviceState& state_;
    cudaStream_t stream_;
};

template <class Program>
void launch(const VisitTables& tables, DeviceState& state, int device, cudaStream_t stream) {
    const uint32_t num_tiles = tables.header.num_tiles;
    if (tables.bytes.size() <= kInlineBytes) {
        InlineTables arguments;
        arguments.header = tables.header;
        std::memcpy(arguments.bytes, tables.bytes.data(), tables.bytes.size());
        visit_kernel<Program><<<num_tiles, kThreads, 0, stream>>>(arguments);
        DZO_CUDA_CHECK_LAUNCH();
        return;
    }
    const Workspace workspace((tables.bytes.size() + 15) / 16 * 16, state, device, stream);
    auto* const bytes = static_cast<uint8_t*>(workspace.data);
    for (size_t at = 0; at < tables.bytes.size(); at += kInlineBytes) {
        Piece piece;
        const size_t num = std::min(kInlineBytes, tables.bytes.size() - at);
        std::memcpy(piece.bytes, tables.bytes.data() + at, num);
        store_piece_kernel<<<1, kThreads, 0, stream>>>(bytes + at, piece, static_cast<uint32_t>(num));
        DZO_CUDA_CHECK_LAUNCH();
    }
    visit_kernel<Program><<<num_tiles, kThreads, 0, stream>>>(WorkspaceTables{tables.header, bytes});
    DZO_CUDA_CHECK_LAUNCH();
}

template <Purpose kFamily>
void launch_simple(const VisitTables& tables, DeviceState& state, int device, cudaStream_t stream) {
    const int updates = tables.shape.num_updates, emits = tables.shape.num_emits;
    if (updates == 1 && emits == 2)
        launch<SimpleProgram<1, 2, kFamily>>(tables, state, device, stream);
    else if (updates == 0 && emits == 2)
        launch<SimpleProgram<0, 2, kFamily>>(tables, state, device, stream);
    else if (updates == 0 && emits == 1)
        launch<SimpleProgram<0, 1, kFamily>>(tables, state, device, stream);
    else if (updates == 1 && emits == 0)
        launch<SimpleProgram<1, 0, kFamily>>(tables, state, device, stream);
    else
        launch<AnyProgram>(tables, state, device, stream);
}

template <Purpose kFamily>
void launch_mixed(const VisitTables& tables, DeviceState& state, int device, cudaStream_t stream) {
    const int updates = tables.shape.num_updates, emits = tables.shape.num_emits;
    if (updates == 1 && emits == 2)
        launch<Mixed<SimpleProgram<1, 2, kFamily>>>(tables, state, device, stream);
    else if (updates == 0 && emits == 2)
        launch<Mixed<SimpleProgram<0, 2, kFamily>>>(tables, state, device, stream);
    else if (updates == 0 && emits == 1)
        launch<Mixed<SimpleProgram<0, 1, kFamily>>>(tables, state, device, stream);
    else
        launch<Mixed<AnyProgram>>(tables, state, device, stream);
}

void launch_visit(const VisitTables& tables, DeviceState& state, int device, cudaStream_t stream) {
    if (tables.shape.anchored)
        launch<Coded<AnchoredProgram>>(tables, state, device, stream);
    else if (tables.shape.low_rank && (tables.shape.coded || tables.shape.mixed))
        launch<Coded<LowRankProgram>>(tables, state, device, stream);
    else if (tables.shape.low_rank)
        launch<LowRankProgram>(tables, state, device, stream);
    else if (tables.shape.coded) // programs of fixed size spill with three formats more
        launch<Coded<AnyProgram>>(tables, state, device, stream);
    else if (tables.shape.mixed && tables.shape.simple && tables.shape.family == Purpose::kNormal)
        launch_mixed<Purpose::kNormal>(tables, state, device, stream);
    else if (tables.shape.mixed && tables.shape.simple && tables.shape.family == Purpose::kRademacher)
        launch_mixed<Purpose::kRademacher>(tables, state, device, stream);
    else if (tables.shape.mixed)
        launch<Mixed<AnyProgram>>(tables, state, device, stream);
    else if (tables.shape.simple && tables.shape.family == Purpose::kNormal)
        launch_simple<Purpose::kNormal>(tables, state, device, stream);
    else if (tables.shape.simple && tables.shape.family == Purpose::kRademacher)
        launch_simple<Purpose::kRademacher>(tables, state, device, stream);
    else
        launch<AnyProgram>(tables, state, device, stream);
}

} // namespace

bool cuda_compiled() { return true; }

void materialize_cuda(const Materialize& visit, int device, CudaStream stream) {
    check(visit);
    if (visit.num_emits == 0 && (visit.num_updates == 0 || !visit.write_back))
        return;
    DeviceState& state = device_state(device);
    static thread_local VisitTables tables; // keeps its storage from visit to visit
    build_tables(visit, state.num_sms, tables);
    if (tables.header.num_tiles > 0)
        launch_visit(tables, state, device, static_cast<cudaStream_t>(stream));
}

void generate_cuda(const InPlace& request, int device, CudaStream stream) {
    if (request.numel == 0)
        return;
    const int num_sms = device_state(device).num_sms;
    const PhiloxKeys keys = philox_keys(request.seed);
    const auto on = static_cast<cudaStream_t>(stream);
    for_each_part(request.offset, request.numel, [&](int64_t begin, int64_t end) {
        InPlace part = request;
        part.data = static_cast<uint8_t*>(request.data) + (begin - request.offset) * dtype_bytes(request.dtype);
        part.offset = begin;
        part.numel = end - begin;
        const uint32_t per_thread = octets_per_thread(num_octets(begin, part.numel), num_sms);
        const uint32_t num_tiles = num_tiles_of(begin, part.numel, per_thread);
        with_dtype(request.dtype, [&](auto dtype) {
            const auto run = [&](auto matrix) {
                generate_kernel<dtype.value><<<num_tiles, kThreads, 0, on>>>(part, keys, per_thread, matrix);
            };
            if (rank_of(request.family) > 0)
                run(DeviceMatrix{request.rows, request.cols});
            else
                run(NoMatrix{});
        });
        DZO_CUDA_CHECK_LAUNCH();
    });
}

void lookup_cuda(const Lookup& request, int device, CudaStream stream) {
    if (request.num_ids == 0 || request.cols == 0)
        return;
    DZO_CHECK(request.num_ids <= INT32_MAX, "num_ids ", request.num_ids);
    device_state(device);
    const auto num_blocks = static_cast<unsigned>(request.num_ids);
    const int64_t warps = (max_octets_of_row(request.cols) + 31) / 32;
    const auto num_threads = static_cast<unsigned>(std::min<int64_t>(warps * 32, kThreads));
    const PhiloxKeys keys = philox_keys(request.seed);
    const auto on = static_cast<cudaStream_t>(stream);
    with_dtype(request.dtype, [&](auto dtype) {
        const auto run = [&](auto matrix) {
            if (request.out_dtype == request.dtype)
                lookup_kernel<dtype.value, false><<<num_blocks, num_threads, 0, on>>>(request, keys, matrix);
            else
                lookup_kernel<dtype.value, true><<<num_blocks, num_threads, 0, on>>>(request, keys, matrix);
        };
        if (rank_of(request.family) > 0)
            run(DeviceMatrix{kMaxElements, request.cols});
        else
            run(NoMatrix{});
    });
    DZO_CUDA_CHECK_LAUNCH();
}

void perturb_cuda(const InPlace& place, float scale, int device, CudaStream stream) {
    materialize_cuda(PerturbVisit(place, scale).visit, device, stream);
}

void update_cuda(const InPlace& place, float lr, float coef, float weight_decay, int device, CudaStream stream) {
    materialize_cuda(UpdateVisit(place, lr, coef, weight_decay).visit, device, stream);
}

} // namespace distzo2
