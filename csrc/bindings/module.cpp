// The Python module distzo2_core._C. The torch ops register themselves when the library is loaded (ops.cpp); the
// classes are bound here, each by the file that owns it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "distzo2_build_info.h" // written by setup.py

namespace py = pybind11;

namespace distzo2 {

void register_modules(py::module_& module);      // modules.cpp
void register_runtime(py::module_& module);      // runtime.cpp
void register_thread_state(py::module_& module); // thread_state.cpp

namespace {

// torch's C++ interface changes with every release, and what another one does with our objects is undefined.
void check_torch() {
    const std::string in_use = py::str(py::module_::import("torch").attr("__version__"));
    if (in_use != DISTZO2_TORCH_VERSION)
        throw py::import_error("distzo2_core._C was built against torch " DISTZO2_TORCH_VERSION ", and torch " +
                               in_use + " is in use: install distzo2 again (pip install --no-build-isolation)");
}

py::dict build_info() {
    py::dict info;
    info["torch"] = DISTZO2_TORCH_VERSION;
    info["cuda"] = std::string(DISTZO2_CUDA_VERSION).size() > 0;
    info["cuda_version"] = DISTZO2_CUDA_VERSION;
    info["cuda_archs"] = std::vector<std::string>{DISTZO2_CUDA_ARCHS};
    info["simd"] = std::vector<std::string>{DISTZO2_SIMD_LEVELS};
    info["compiler"] = DISTZO2_COMPILER;
    return info;
}

} // namespace
} // namespace distzo2

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    distzo2::check_torch();
    module.doc() =
        "Compiled core of distzo2: torch ops (torch.ops.distzo2), HostPool, CopyEngine, BlockFile, ThreadState";
    module.def("build_info", &distzo2::build_info,
               R"(What this build holds.

torch: the version it was built against; cuda: whether it has CUDA kernels; cuda_version, cuda_archs; simd:
its variants of the CPU kernels; compiler.)");
    distzo2::register_modules(module);
    distzo2::register_runtime(module);
    distzo2::register_thread_state(module);
}
