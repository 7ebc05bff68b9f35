"""Builds distzo2_core._C: CMake makes the torch-free libraries, torch's BuildExtension compiles the bindings over them.

Environment: DISTZO2_CUDA=0|1|auto (CUDA kernels; auto: where nvcc is found), CUDAARCHS (their architectures, such as
90-real;80-real), MAX_JOBS (compile jobs).
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "error: distzo2 is built against the torch that it will run with, and there is none here: "
        "install torch, then run pip install --no-build-isolation ."
    )

if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
    sys.exit("error: Python.h not found: install the development files of this Python (on Debian, python3-dev)")

ROOT = Path(__file__).resolve().parent
CORE_BUILD = ROOT / "build" / "core"
LIBRARIES = ("distzo2_kernels", "distzo2_runtime")


def find_tool(name: str) -> str | None:
    """Path of a program that belongs to this Python's environment, else of the one on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def find_nvcc_of_pip() -> str | None:
    """Path of nvcc from the package nvidia-cuda-nvcc, used where no CUDA toolkit is installed."""
    for folder in sys.path:
        nvcc = Path(folder) / "nvidia" / "cu13" / "bin" / "nvcc"
        if nvcc.exists():
            return str(nvcc)
    return None


def build_core() -> dict:
    """Build the static libraries with CMake and return what CMake says of the build (build_info.json)."""
    cmake = find_tool("cmake")
    if cmake is None:
        sys.exit("error: cmake (3.25 or later) not found: pip install cmake")
    environment = dict(os.environ)
    if "CUDACXX" not in environment and shutil.which("nvcc") is None:
        nvcc = find_nvcc_of_pip()
        if nvcc is not None:
            environment["CUDACXX"] = nvcc
    configure = [cmake, "-S", str(ROOT), "-B", str(CORE_BUILD)]
    configure.append(f"-DDISTZO2_CUDA={os.environ.get('DISTZO2_CUDA', 'auto')}")
    configure.append(f"-DDISTZO2_CUDAARCHS={os.environ.get('CUDAARCHS', '')}")
    ninja = find_tool("ninja")
    if ninja is not None and not (CORE_BUILD / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    try:
        subprocess.run(configure, env=environment, check=True)
        subprocess.run(
            [cmake, "--build", str(CORE_BUILD), "-j", jobs, "--target", *LIBRARIES], env=environment, check=True
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: the build of the core failed ({' '.join(error.cmd[:4])} ...), see its output above")
    return json.loads((CORE_BUILD / "build_info.json").read_text())


def write_build_info(core: dict) -> None:
    """Write the header that module.cpp bakes in; unchanged text leaves the file alone, so that nothing is rebuilt."""

    def strings(values: list[str]) -> str:
        return ", ".join(f'"{value}"' for value in values)

    text = f"""#pragma once
#define DISTZO2_TORCH_VERSION "{torch.__version__}"
#define DISTZO2_CUDA_VERSION "{core["cuda_version"]}"
#define DISTZO2_CUDA_ARCHS {strings(core["cuda_archs"])}
#define DISTZO2_SIMD_LEVELS {strings(core["simd"])}
#define DISTZO2_COMPILER "{core["compiler"]}"
"""
    header = CORE_BUILD / "distzo2_build_info.h"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


class BuildCore(BuildExtension):
    """Builds the CMake libraries first and links them into the extension."""

    def finalize_options(self) -> None:
        """Keep the objects in build/, where wheels, editable installs and in-place builds find them again."""
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "bindings")

    def build_extensions(self) -> None:
        """Build the libraries, then the extension."""
        core = build_core()
        write_build_info(core)
        libraries = [str(CORE_BUILD / f"lib{name}.a") for name in LIBRARIES]
        headers = [CORE_BUILD / "distzo2_build_info.h", *sorted((ROOT / "csrc").rglob("*.h"))]
        for extension in self.extensions:
            extension.depends = [*libraries, *map(str, headers)]
            extension.include_dirs.append(str(CORE_BUILD))
            extension.extra_objects = libraries
            extension.libraries += ["dl", "rt", "pthread"]
            if core["compiler"].startswith("GNU"):
                # at::parallel_for needs it. It is not linked: GCC's calls are met by the runtime that torch has loaded.
                # Another compiler's runtime would run beside torch's; there the kernels start threads of their own.
                extension.extra_compile_args["cxx"].append("-fopenmp")
            if core["cuda_version"]:
                extension.define_macros.append(("DISTZO2_WITH_CUDA", "1"))
                extension.extra_objects.append(core["cudart"])
        super().build_extensions()
        cuda = f"{core['cuda_version']} for {', '.join(core['cuda_archs'])}" if core["cuda_version"] else "none"
        print(f"distzo2_core._C: torch {torch.__version__}, CUDA kernels {cuda}, SIMD {', '.join(core['simd'])}")


bindings = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "bindings").glob("*.cpp"))
setup(
    ext_modules=[
        CppExtension(
            "distzo2_core._C",
            bindings,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": [
                    "-O3",
                    "-g0",  # where Python asks for -g, it is a third of the time
                    "-std=c++20",
                    "-ffp-contract=off",
                    "-Wall",
                    "-Wextra",
                    "-Wno-unused-parameter",  # torch's own headers
                    "-fvisibility=hidden",
                    f"-fmacro-prefix-map={ROOT}/=",
                ]
            },
        )
    ],
    cmdclass={"build_ext": BuildCore.with_options(use_ninja=True)},
)
