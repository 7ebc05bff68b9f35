# One executable and one ctest entry per tests/cpp/*_test.cpp.
file(GLOB test_sources CONFIGURE_DEPENDS tests/cpp/*_test.cpp)
set(launcher "")
if(DISTZO2_SANITIZE STREQUAL "thread")
    set(launcher "${CMAKE_SOURCE_DIR}/cmake/without_aslr.sh")
endif()
foreach(source ${test_sources})
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_include_directories(${name} PRIVATE tests/cpp)
    target_link_libraries(${name} PRIVATE distzo2_kernels distzo2_runtime)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
    add_test(NAME ${name} COMMAND ${launcher} $<TARGET_FILE:${name}>)
    set_tests_properties(${name} PROPERTIES TIMEOUT 300 ENVIRONMENT
        "UBSAN_OPTIONS=print_stacktrace=1;TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1")
endforeach()

# A model of AVX-512 in structs: the optimizer takes minutes to see through it, and the test some seconds without.
set_source_files_properties(${CMAKE_SOURCE_DIR}/tests/cpp/avx512_model_test.cpp PROPERTIES COMPILE_OPTIONS "-O0")
