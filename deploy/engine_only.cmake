# Read by CMake right after llama-cpp-python's project() line (CMAKE_PROJECT_llama_cpp_INCLUDE). Its CMakeLists.txt forces some
# cache entries ON; ordinary variables win over the cache (policy CMP0126), so the choices are made here without touching its sources.
# Kept: ggml and llama, which is all that the bindings load. Left out: common, tools, server, tests, the multimodal library.
set(LLAMA_BUILD_COMMON OFF)
set(LLAMA_BUILD_TOOLS OFF)
set(LLAMA_BUILD_EXAMPLES OFF)
set(LLAMA_BUILD_TESTS OFF)
set(LLAMA_BUILD_SERVER OFF)
set(LLAVA_BUILD OFF)
# One copy of each library, inside the package: by default a second one lands at the top of site-packages.
set(CMAKE_INSTALL_LIBDIR llama_cpp/lib)
set(CMAKE_INSTALL_BINDIR llama_cpp/lib)
set(CMAKE_INSTALL_INCLUDEDIR llama_cpp/include)
# ggml's kernels for Intel's AMX end in segmentation faults (ggml-org/llama.cpp issue 20824, open): seen on a Xeon with AMX, where a tiny
# Q4_1 model crashed at its first token. Without the macro they are not compiled, and AVX-512 does the work; no other processor has it.
add_compile_options(-U__AMX_INT8__)
