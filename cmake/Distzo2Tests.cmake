# One executable and one ctest entry per tests/cpp/*/*_test.cpp; more entries for those that run over a CUDA driver.
file(GLOB test_sources CONFIGURE_DEPENDS tests/cpp/*/*_test.cpp)
set(launcher "")
if(DISTZO2_SANITIZE STREQUAL "thread")
    set(launcher "${CMAKE_SOURCE_DIR}/cmake/without_aslr.sh")
    # These run in one thread, where there is no race to find.
    list(FILTER test_sources EXCLUDE REGEX "/noise/|/avx512_model_test|/visit_device_test")
endif()
set(sanitizer_environment
    "UBSAN_OPTIONS=print_stacktrace=1;TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1")
foreach(source ${test_sources})
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_include_directories(${name} PRIVATE tests/cpp/helpers)
    target_link_libraries(${name} PRIVATE distzo2_runtime)
    if(NOT source MATCHES "/runtime/" OR name STREQUAL "training_stress_test") # the others need not wait for kernels
        target_link_libraries(${name} PRIVATE distzo2_kernels)
    endif()
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
    add_test(NAME ${name} COMMAND ${launcher} $<TARGET_FILE:${name}>)
    set_tests_properties(${name} PROPERTIES TIMEOUT 300 ENVIRONMENT "${sanitizer_environment}")
endforeach()

# A libcuda.so.1 of ours, and one that lacks a function.
foreach(kind fake old)
    add_library(${kind}_libcuda SHARED tests/cpp/helpers/fake_libcuda.cpp)
    target_include_directories(${kind}_libcuda PRIVATE csrc)
    target_link_libraries(${kind}_libcuda PRIVATE distzo2_flags Threads::Threads)
    # GCC 12's leak sanitizer crashes on the threads' variables of a library that was loaded late.
    target_compile_options(${kind}_libcuda PRIVATE -ftls-model=initial-exec)
    set_target_properties(${kind}_libcuda PROPERTIES OUTPUT_NAME cuda VERSION 1 SOVERSION 1 CXX_VISIBILITY_PRESET hidden
        VISIBILITY_INLINES_HIDDEN ON LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests/${kind}_libcuda")
    string(TOUPPER "${kind}_LIBCUDA" definition)
    target_compile_definitions(driver_load_test PRIVATE ${definition}="$<TARGET_FILE:${kind}_libcuda>")
    add_dependencies(driver_load_test ${kind}_libcuda)
endforeach()
target_compile_definitions(old_libcuda PRIVATE FAKE_LIBCUDA_OLD)

# The same executables over a loaded libcuda: ours, and the machine's, where there is one (sanitizers cannot see into it).
# Of the training, what uses the driver, in its short form; over ours one of them.
set(steps_training_stress_test 150)
set(steps_copy_engine_cuda_test 500)
set(filter_training_stress_test cuda_)
set(fake_filter_training_stress_test cuda_from_file_writing_in_turn)
foreach(name host_pool_test copy_engine_cuda_test training_stress_test)
    add_test(NAME ${name}.fake_libcuda COMMAND ${launcher} $<TARGET_FILE:${name}> ${fake_filter_${name}})
    add_dependencies(${name} fake_libcuda)
    set(driver_environment "DISTZO2_TEST_DRIVER=real;${sanitizer_environment}")
    if(steps_${name})
        list(APPEND driver_environment DISTZO2_STRESS_STEPS=${steps_${name}})
    endif()
    set_tests_properties(${name}.fake_libcuda PROPERTIES TIMEOUT 300 ENVIRONMENT "${driver_environment}"
        ENVIRONMENT_MODIFICATION "LD_LIBRARY_PATH=path_list_prepend:$<TARGET_FILE_DIR:fake_libcuda>")
    if(NOT DISTZO2_SANITIZE)
        add_test(NAME ${name}.libcuda COMMAND $<TARGET_FILE:${name}> ${filter_${name}})
        set_tests_properties(${name}.libcuda PROPERTIES TIMEOUT 300 LABELS libcuda SKIP_RETURN_CODE 77
            ENVIRONMENT "${driver_environment}")
    endif()
endforeach()

# A model of AVX-512 in structs: the optimizer takes minutes to see through it, and the test some seconds without.
set_source_files_properties(${CMAKE_SOURCE_DIR}/tests/cpp/kernels/avx512_model_test.cpp PROPERTIES COMPILE_OPTIONS "-O0")
# Every program of the CUDA kernels in one file: -O1 takes a quarter of the time that -O3 does.
set_source_files_properties(${CMAKE_SOURCE_DIR}/tests/cpp/kernels/visit_device_test.cpp PROPERTIES COMPILE_OPTIONS "-O1")
