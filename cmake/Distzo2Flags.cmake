# Compiler flags of every target. Bits are a contract of this project: products and sums are fused only where the code
# says fma, and no flag that relaxes IEEE arithmetic is ever given. The language standard is among the flags because
# CMake 3.25 knows no C++20 for nvcc 13.
add_library(distzo2_flags INTERFACE)
target_compile_options(distzo2_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-std=c++20 -ffp-contract=off -Wall -Wextra -fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Through the inlined loops over an octet's elements, GCC 12 sees uninitialized noise where there is none.
    target_compile_options(distzo2_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
endif()
if(DISTZO2_WERROR)
    target_compile_options(distzo2_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()

if(DISTZO2_SANITIZE STREQUAL "address")
    # Without three checks of each access, at a third of the time that compiling takes: ASan finds what they would.
    set(sanitizer_flags -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow
        -fno-sanitize-recover=all)
elseif(DISTZO2_SANITIZE STREQUAL "thread")
    set(sanitizer_flags -fsanitize=thread)
elseif(NOT DISTZO2_SANITIZE STREQUAL "")
    message(FATAL_ERROR "DISTZO2_SANITIZE is '${DISTZO2_SANITIZE}', expected empty, address or thread")
endif()
if(sanitizer_flags)
    set(DISTZO2_CUDA "0") # device code has its own checker, compute-sanitizer
    set(CMAKE_CXX_FLAGS_RELEASE "-O1")
    target_compile_options(distzo2_flags INTERFACE ${sanitizer_flags} -g1 -fno-omit-frame-pointer)
    target_link_options(distzo2_flags INTERFACE ${sanitizer_flags})
endif()

# distzo2_select_simd(<sources-variable> <levels-variable>): gives *_avx2.cpp and *_avx512.cpp their instruction sets on
# x86-64 and drops them elsewhere. Only these files may hold such instructions; the level is chosen at run time.
function(distzo2_select_simd sources_variable levels_variable)
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU") # without it GCC undoes the interleaving of independent chains: 15% slower
        list(APPEND flags_avx2 -fno-tree-ter)
        list(APPEND flags_avx512 -fno-tree-ter)
    endif()
    set(sources ${${sources_variable}})
    set(levels "")
    foreach(level avx2 avx512)
        set(level_sources ${sources})
        list(FILTER level_sources INCLUDE REGEX "_${level}\\.cpp$")
        if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
            set_source_files_properties(${level_sources} PROPERTIES COMPILE_OPTIONS "${flags_${level}}")
            if(level_sources)
                list(APPEND levels ${level})
            endif()
        else()
            list(FILTER sources EXCLUDE REGEX "_${level}\\.cpp$")
        endif()
    endforeach()
    set(${sources_variable} ${sources} PARENT_SCOPE)
    set(${levels_variable} ${levels} PARENT_SCOPE)
endfunction()
