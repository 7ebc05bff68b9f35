// The torch ops distzo2::*: schemas, and dispatch to the kernels. distzo2_core/ops.py checks the arguments; what is
// refused here is only what would be read or written out of bounds. CPU ops run on torch's intra-op threads; CUDA ops
// are enqueued on the current stream of the tensors' device. Autograd records none of them, but what they change has
// its version counter raised, so that a backward pass over a saved tensor notices.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace distzo2 {
namespace {

using at::Tensor;

[[maybe_unused]] void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
    at::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(context, from, to); });
}

#if defined(_OPENMP)
const bool hook_is_set = (set_parallel_for(&run_on_torch_threads), true);
#else // at::parallel_for, compiled here without OpenMP, would stay on one thread: the kernels' own, as many as torch's
void run_on_own_threads(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
    const int64_t share = (end - begin + at::get_num_threads() - 1) / at::get_num_threads();
    run_on_std_threads(begin, end, std::max(grain, share), body, context);
}
const bool hook_is_set = (set_parallel_for(&run_on_own_threads), true);
#endif

DType dtype_of(at::ScalarType type, const char* what) {
    switch (type) {
    case at::kFloat:
        return DType::kFp32;
    case at::kBFloat16:
        return DType::kBf16;
    case at::kHalf:
        return DType::kFp16;
    default:
        TORCH_CHECK_TYPE(false, what, " must be float32, bfloat16 or float16, got ", type);
    }
}

// The rows of a table among the op's arguments: a contiguous CPU tensor of this type and shape.
template <class Row>
const Row* table(const Tensor& tensor, at::ScalarType type, at::IntArrayRef shape, const char* what) {
    TORCH_CHECK(tensor.device().is_cpu(), what, " must be a CPU tensor, got one on ", tensor.device());
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, what, " must be ", type, ", got ", tensor.scalar_type());
    TORCH_CHECK(tensor.is_contiguous(), what, " must be contiguous");
    TORCH_CHECK_VALUE(tensor.sizes() == shape, what, " must have shape ", shape, ", got ", tensor.sizes());
    return static_cast<const Row*>(tensor.const_data_ptr());
}

// Throws for an inference tensor outside of inference mode, as torch's own in-place ops do.
void mark_changed(const Tensor& tensor) { tensor.unsafeGetTensorImpl()->bump_version(); }

void check_device(c10::Device device) {
    TORCH_CHECK(device.is_cpu() || device.is_cuda(), "distzo2 has native kernels for cpu and cuda, not for ", device);
    TORCH_CHECK(device.is_cpu() || cuda_compiled(), "distzo2 was built without CUDA kernels");
}

// A CUDA device, current for as long as this lives, and its current stream. By torch's device-neutral interface, since
// this file compiles against a CPU-only torch; its guard makes no context on the device that was current before.
struct OnDevice {
    explicit OnDevice(c10::Device device)
        : guard(device), index(device.index()),
          stream(reinterpret_cast<CudaStream>(
              c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle())) {}
    const c10::DeviceGuard guard;
    const int index;
    const CudaStream stream;
};

InPlace in_place(Tensor& w, int64_t seed, int64_t step, int64_t param, int64_t probe, int64_t offset, int64_t family,
                 int64_t rows, int64_t cols) {
    check_device(w.device());
    TORCH_CHECK_VALUE(w.is_contiguous(), "expected a contiguous tensor, got shape ", w.sizes(), " with strides ",
                      w.strides());
    TORCH_CHECK_VALUE(cols == 0 || (cols > 0 && rows > 0), "expected a matrix, got ", rows, " x ", cols);
    return {w.mutable_data_ptr(),
            dtype_of(w.scalar_type(), "the tensor"),
            w.numel(),
            static_cast<uint64_t>(seed),
            family,
            step,
            param,
            probe,
            offset,
            rows,
            cols};
}

void noise_(Tensor out, int64_t seed, int64_t step, int64_t param, int64_t probe, int64_t offset, int64_t family,
            int64_t rows, int64_t cols) {
    const InPlace place = in_place(out, seed, step, param, probe, offset, family, rows, cols);
    if (place.numel == 0)
        return;
    mark_changed(out);
    if (out.is_cpu()) {
        generate_cpu(place);
    } else {
        const OnDevice on(out.device());
        generate_cuda(place, on.index, on.stream);
    }
}

void perturb_(Tensor w, double scale, int64_t seed, int64_t step, int64_t param, int64_t probe, int64_t offset,
              int64_t family, int64_t rows, int64_t cols) {
    const InPlace place = in_place(w, seed, step, param, probe, offset, family, rows, cols);
    const auto scale32 = static_cast<float>(scale);
    if (place.numel == 0)
        return;
    mark_changed(w);
    if (w.is_cpu()) {
        perturb_cpu(place, scale32);
    } else {
        const OnDevice on(w.device());
        perturb_cuda(place, scale32, on.index, on.stream);
    }
}

void update_(Tensor w, double lr, double coef, double weight_decay, int64_t seed, int64_t step, int64_t param,
             int64_t probe, int64_t offset, int64_t family, int64_t rows, int64_t cols) {
    const InPlace place = in_place(w, seed, step, param, probe, offset, family, rows, cols);
    const auto lr32 = static_cast<float>(lr), coef32 = static_cast<float>(coef);
    const auto decay32 = static_cast<float>(weight_decay);
    if (place.numel == 0)
        return;
    mark_changed(w);
    if (w.is_cpu()) {
        update_cpu(place, lr32, coef32, decay32);
    } else {
        const OnDevice on(w.device());
        update_cuda(place, lr32, coef32, decay32, on.index, on.stream);
    }
}

Tensor embedding(const Tensor& weight, const Tensor& ids, double scale, int64_t seed, int64_t step, int64_t param,
                 int64_t probe, int64_t offset, int64_t family, std::optional<at::ScalarType> out_dtype) {
    check_device(weight.device());
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous matrix, got shape ",
                      weight.sizes(), " with strides ", weight.strides());
    TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, "ids must be int64, got ", ids.scalar_type());
    TORCH_CHECK_VALUE(ids.device() == weight.device(), "ids must be on ", weight.device(), " as weight is, got ",
                      ids.device());
    const Tensor rows = ids.contiguous();
    Lookup request;
    request.dtype = dtype_of(weight.scalar_type(), "weight");
    request.out_dtype = dtype_of(out_dtype.value_or(weight.scalar_type()), "out_dtype");
    std::vector<int64_t> shape = ids.sizes().vec();
    shape.push_back(weight.size(1));
    Tensor out =
        at::empty(shape, weight.options().dtype(out_dtype.value_or(weight.scalar_type())).requires_grad(false));
    request.table = weight.const_data_ptr();
    request.out = out.mutable_data_ptr();
    request.ids = rows.const_data_ptr<int64_t>();
    request.num_ids = rows.numel();
    request.num_rows = weight.size(0);
    request.cols = weight.size(1);
    request.scale = static_cast<float>(scale);
    request.seed = static_cast<uint64_t>(seed);
    request.family = family;
    request.step = step;
    request.param = param;
    request.probe = probe;
    request.offset = offset;
    if (weight.is_cpu()) {
        try {
            lookup_cpu(request);
        } catch (const std::out_of_range& error) {
            TORCH_CHECK_INDEX(false, error.what());
        }
    } else {
        const OnDevice on(out.device());
        lookup_cuda(request, on.index, on.stream);
    }
    return out;
}

// like: the name of a buffer that has `num_bytes`, as this one must have.
uint8_t* buffer(const Tensor& tensor, const Tensor& weights, int64_t num_bytes, const char* like,
                const std::string& what) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kByte, what, " must be uint8, got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.is_contiguous(), what, " must be a contiguous vector, got shape ",
                      tensor.sizes(), " with strides ", tensor.strides());
    TORCH_CHECK_VALUE(tensor.device() == weights.device(), what, " must be on ", weights.device(),
                      " as weights are, got ", tensor.device());
    TORCH_CHECK_VALUE(tensor.numel() == num_bytes, what, " must have ", num_bytes, " bytes as ", like, " has, got ",
                      tensor.numel());
    return static_cast<uint8_t*>(tensor.mutable_data_ptr());
}

void materialize(const Tensor& weights, const Tensor& segments, int64_t seed, const Tensor& terms, const Tensor& coefs,
                 const Tensor& updates, const Tensor& update_groups, const Tensor& emits, const Tensor& emit_scales,
                 at::TensorList outs, bool write_back) {
    check_device(weights.device());
    Materialize visit;
    visit.num_bytes = weights.numel();
    visit.weights = buffer(weights, weights, visit.num_bytes, "weights", "weights");
    visit.out_bytes = outs.empty() ? 0 : outs[0].numel();
    visit.seed = static_cast<uint64_t>(seed);
    visit.write_back = write_back;
    visit.num_segments = segments.dim() > 0 ? segments.size(0) : 0;
    visit.segments = table<Segment>(segments, at::kLong, {visit.num_segments, 12}, "segments");
    visit.num_terms = terms.dim() > 0 ? terms.size(0) : 0;
    visit.terms = table<Term>(terms, at::kLong, {visit.num_terms, 4}, "terms");
    visit.coefs = table<float>(coefs, at::kFloat, {visit.num_terms}, "coefs");
    visit.num_updates = updates.dim() > 0 ? updates.size(0) : 0;
    visit.num_emits = emits.dim() > 0 ? emits.size(0) : 0;
    visit.num_groups = update_groups.dim() > 1 ? update_groups.size(1) : 0;
    visit.updates = table<Update>(updates, at::kLong, {visit.num_updates, 3}, "updates");
    visit.emits = table<Emit>(emits, at::kLong, {visit.num_emits, 2}, "emits");
    visit.update_groups =
        table<UpdateGroup>(update_groups, at::kFloat, {visit.num_updates, visit.num_groups, 4}, "update_groups");
    visit.emit_scales = table<float>(emit_scales, at::kFloat, {visit.num_emits, visit.num_groups}, "emit_scales");
    TORCH_CHECK_VALUE(static_cast<int64_t>(outs.size()) == visit.num_emits,
                      "there must be one out for each emit: ", visit.num_emits, " emits, ", outs.size(), " outs");
    std::vector<uint8_t*> pointers;
    pointers.reserve(outs.size());
    for (const Tensor& out : outs)
        pointers.push_back(
            buffer(out, weights, visit.out_bytes, "outs[0]", "outs[" + std::to_string(pointers.size()) + "]"));
    visit.outs = pointers.data();
    if (write_back && visit.num_updates > 0)
        mark_changed(weights);
    for (const Tensor& out : outs)
        mark_changed(out);
    if (weights.is_cpu()) {
        materialize_cpu(visit);
    } else {
        const OnDevice on(weights.device());
        materialize_cuda(visit, on.index, on.stream);
    }
}

void decode(const Tensor& stored, const Tensor& matrices, const Tensor& levels, const Tensor& out,
            const std::optional<Tensor>& gains) {
    check_device(stored.device());
    TORCH_CHECK_VALUE(out.device() == stored.device(), "out must be on ", stored.device(), " as stored is, got ",
                      out.device());
    Decode request;
    request.num_bytes = stored.numel();
    request.stored = buffer(stored, stored, request.num_bytes, "stored", "stored");
    request.out_bytes = out.numel();
    request.out = buffer(out, out, request.out_bytes, "out", "out");
    if (gains.has_value()) {
        TORCH_CHECK_VALUE(gains->device() == stored.device(), "gains must be on ", stored.device(),
                          " as stored is, got ", gains->device());
        request.gain_bytes = gains->numel();
        request.gains = buffer(*gains, stored, request.gain_bytes, "gains", "gains");
    }
    request.num_matrices = matrices.dim() > 0 ? matrices.size(0) : 0;
    constexpr int64_t kColumns = sizeof(PackedMatrix) / sizeof(int64_t);
    request.matrices = table<PackedMatrix>(matrices, at::kLong, {request.num_matrices, kColumns}, "matrices");
    request.levels = table<float>(levels, at::kFloat, {request.num_matrices, kNumLevels}, "levels");
    mark_changed(out);
    if (stored.is_cpu()) {
        decode_cpu(request);
    } else {
        const OnDevice on(stored.device());
        decode_cuda(request, on.index, on.stream);
    }
}

int64_t checksum(const Tensor& data, int64_t before) {
    TORCH_CHECK_VALUE(data.is_contiguous(), "expected contiguous data, got shape ", data.sizes(), " with strides ",
                      data.strides());
    return static_cast<int64_t>(
        checksum_cpu(data.const_data_ptr(), static_cast<int64_t>(data.nbytes()), static_cast<uint64_t>(before)));
}

} // namespace
} // namespace distzo2

TORCH_LIBRARY(distzo2, library) {
    library.def("noise_(Tensor(a!) out, int seed, int step, int param, int probe, int offset, int family, int rows=0, "
                "int cols=0) -> ()");
    library.def("perturb_(Tensor(a!) w, float scale, int seed, int step, int param, int probe, int offset, int family, "
                "int rows=0, int cols=0) -> ()");
    library.def("update_(Tensor(a!) w, float lr, float coef, float weight_decay, int seed, int step, int param, "
                "int probe, int offset, int family, int rows=0, int cols=0) -> ()");
    library.def("embedding(Tensor weight, Tensor ids, float scale, int seed, int step, int param, int probe, "
                "int offset, int family, ScalarType? out_dtype=None) -> Tensor");
    library.def(
        "materialize(Tensor(a!) weights, Tensor segments, int seed, Tensor terms, Tensor coefs, Tensor updates, "
        "Tensor update_groups, Tensor emits, Tensor emit_scales, Tensor(b!)[] outs, bool write_back) -> ()");
    library.def("decode(Tensor stored, Tensor matrices, Tensor levels, Tensor(a!) out, Tensor? gains=None) -> ()");
    library.def("checksum(Tensor data, int before) -> int");
}

#define DZO_REGISTER(key)                                                                                              \
    TORCH_LIBRARY_IMPL(distzo2, key, library) {                                                                        \
        library.impl("noise_", &distzo2::noise_);                                                                      \
        library.impl("perturb_", &distzo2::perturb_);                                                                  \
        library.impl("update_", &distzo2::update_);                                                                    \
        library.impl("embedding", &distzo2::embedding);                                                                \
        library.impl("materialize", &distzo2::materialize);                                                            \
        library.impl("decode", &distzo2::decode);                                                                      \
    }

DZO_REGISTER(CPU)
DZO_REGISTER(CUDA)

TORCH_LIBRARY_IMPL(distzo2, CPU, library) { library.impl("checksum", &distzo2::checksum); }
