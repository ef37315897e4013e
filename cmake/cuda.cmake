# The CUDA backends: host code in C, which needs nothing of the toolkit, and one fatbin for each file of
# src/cuda/kernels, compiled by an explicit nvcc command and embedded into the library.
#
# FLASHKDA_CUDA   AUTO  with nvcc and the CUTLASS headers; without them CPU only, and it says so
#                 ON    the same, but what is missing is an error
#                 OFF   CPU only
#                 HOST  host code with placeholders for kernels: what the tests with a driver of their
#                       own need (sanitizers, cross builds); nothing to run on a GPU
#
# Sets FKDA_WITH_CUDA (0 or 1), FKDA_CUDA_SOURCES, FKDA_CUDA_TEXT, and for every directory <family> of kernels
# FKDA_CUDA_LOGS_<family> (what ptxas said) and FKDA_CUDA_ARCHITECTURES_<family>; FKDA_CUDA_FAMILIES lists them.
set(FLASHKDA_CUDA AUTO CACHE STRING "Build CUDA kernels: AUTO, ON, OFF or HOST")
set_property(CACHE FLASHKDA_CUDA PROPERTY STRINGS AUTO ON OFF HOST)
set(FLASHKDA_CUDA_ARCHITECTURES 80 90 100 120 CACHE STRING "Compute capabilities to compile for")
set(FLASHKDA_CUDA_PTX 80 CACHE STRING "Compute capabilities to embed PTX for")
option(FLASHKDA_CUDA_ALLOW_SPILLS "Let kernels spill registers (while working on them)" OFF)
option(FLASHKDA_CUDA_RACECHECK "Kernels for compute-sanitizer's racecheck: slower, the same results" OFF)
set(default_cache "${CMAKE_CURRENT_BINARY_DIR}/cache")
if(PROJECT_IS_TOP_LEVEL)
  set(default_cache "${CMAKE_CURRENT_SOURCE_DIR}/build/cache") # one for all build directories
endif()
set(FLASHKDA_CACHE_DIR "${default_cache}" CACHE PATH "Where fetched headers and compiled kernels are kept")
mark_as_advanced(FLASHKDA_CACHE_DIR)

if(NOT FLASHKDA_CUDA MATCHES "^(AUTO|ON|OFF|HOST)$")
  message(FATAL_ERROR "FLASHKDA_CUDA=${FLASHKDA_CUDA}: expected AUTO, ON, OFF or HOST")
endif()

include(cutlass)

set(FKDA_NVCC_MINIMUM 12.9)
set(FKDA_NVCC_FLAGS -std=c++17 -O3 -Werror all-warnings -Xptxas -v)
if(FLASHKDA_CUDA_RACECHECK)
  list(APPEND FKDA_NVCC_FLAGS -DFKDA_RACECHECK)
  set(FLASHKDA_CUDA_ALLOW_SPILLS ON)
endif()

# Is there an nvcc that works? Sets FLASHKDA_NVCC and FKDA_NVCC_VERSION.
function(fkda_find_nvcc why)
  # Not the system's default directories: a build without nvcc in PATH is to be one without nvcc.
  find_program(FLASHKDA_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH ENV CUDAToolkit_ROOT
    PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH DOC "CUDA compiler")
  if(NOT FLASHKDA_NVCC)
    set(${why} "no nvcc in PATH, CUDA_HOME or FLASHKDA_NVCC" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${FLASHKDA_NVCC} --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT text MATCHES "release ([0-9]+)\\.([0-9]+)")
    set(${why} "${FLASHKDA_NVCC} does not tell its version" PARENT_SCOPE)
    return()
  endif()
  set(version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  if(version VERSION_LESS FKDA_NVCC_MINIMUM)
    set(${why} "nvcc ${version}, expected ${FKDA_NVCC_MINIMUM} or newer" PARENT_SCOPE)
    return()
  endif()
  # It needs a C++ compiler that it knows.
  if(NOT FKDA_NVCC_WORKS STREQUAL "${FLASHKDA_NVCC} ${version}")
    set(probe "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/nvcc-probe")
    file(WRITE "${probe}.cu" "__global__ void probe() {}\n")
    execute_process(COMMAND ${FLASHKDA_NVCC} -std=c++17 -arch=sm_80 --fatbin -o "${probe}.fatbin" "${probe}.cu"
      RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(NOT result EQUAL 0)
      string(STRIP "${output}" output)
      string(REGEX REPLACE "\n.*" "" output "${output}")
      set(${why} "nvcc ${version} does not compile (${output})" PARENT_SCOPE)
      return()
    endif()
    set(FKDA_NVCC_WORKS "${FLASHKDA_NVCC} ${version}" CACHE INTERNAL "nvcc that was tried")
  endif()
  set(FKDA_NVCC_VERSION "${version}" PARENT_SCOPE)
endfunction()

# fkda_add_fatbin(portable/prefill -gencode ...): adds the command, and what it makes to FKDA_FATBINS and
# FKDA_CUDA_LOGS_portable.
function(fkda_add_fatbin name)
  set(source "${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/kernels/${name}.cu")
  set(output "${CMAKE_CURRENT_BINARY_DIR}/kernels/${name}")
  get_filename_component(directory "${output}" DIRECTORY)
  file(MAKE_DIRECTORY "${directory}")
  add_custom_command(
    OUTPUT "${output}.fatbin" "${output}.log"
    COMMAND ${CMAKE_COMMAND}
      -D "OUTPUT=${output}" -D "SOURCE=${source}" -D "PROJECT=${CMAKE_CURRENT_SOURCE_DIR}"
      -D "CACHE=${FLASHKDA_CACHE_DIR}/kernels" -D "ALLOW_SPILLS=${FLASHKDA_CUDA_ALLOW_SPILLS}"
      -P "${CMAKE_CURRENT_SOURCE_DIR}/cmake/build_fatbin.cmake"
      -- "${FLASHKDA_NVCC}" ${FKDA_NVCC_FLAGS} ${ARGN} --threads 0
      "-I${CMAKE_CURRENT_SOURCE_DIR}/include" "-I${CMAKE_CURRENT_SOURCE_DIR}/src"
      -isystem "${FKDA_CUTLASS_INCLUDE}"
    DEPENDS "${source}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/build_fatbin.cmake"
    DEPFILE "${output}.d"
    COMMENT "Compiling CUDA kernels ${name}.cu"
    VERBATIM)
  set(FKDA_FATBINS ${FKDA_FATBINS} "${output}.fatbin" PARENT_SCOPE)
  fkda_family(family "${name}")
  set(FKDA_CUDA_LOGS_${family} ${FKDA_CUDA_LOGS_${family}} "${output}.log" PARENT_SCOPE)
endfunction()

# fkda_family(<out> portable/prefill): portable
function(fkda_family out name)
  string(REGEX REPLACE "/.*$" "" family "${name}")
  set(${out} "${family}" PARENT_SCOPE)
endfunction()

# The C file that puts the fatbins into the library. toolkit: 1000 * major + 10 * minor.
function(fkda_write_images file toolkit)
  set(blobs "")
  set(rows "")
  foreach(name IN LISTS ARGN)
    string(MAKE_C_IDENTIFIER "fkda_fatbin_${name}" symbol)
    if(FLASHKDA_CUDA STREQUAL "HOST")
      string(APPEND blobs "static const char ${symbol}[] = \"placeholder ${name}\";\n")
    else()
      string(APPEND blobs "extern const char ${symbol}[];\n"
        "__asm__(\".pushsection .rodata\\n.balign 64\\n\"\n"
        "        \".hidden ${symbol}\\n.globl ${symbol}\\n${symbol}:\\n\"\n"
        "        \".incbin \\\"${CMAKE_CURRENT_BINARY_DIR}/kernels/${name}.fatbin\\\"\\n.popsection\");\n")
    endif()
    string(APPEND rows "    {\"${name}\", ${symbol}},\n")
  endforeach()
  file(CONFIGURE OUTPUT "${file}" CONTENT "/* Written by cmake/cuda.cmake. */
#include \"cuda/images.h\"

#include <stddef.h>

${blobs}
const fkda_cuda_image fkda_cuda_images[] = {
${rows}    {NULL, NULL},
};
const int32_t fkda_cuda_toolkit_version = ${toolkit};
")
endfunction()

set(FKDA_WITH_CUDA 0)
set(FKDA_CUDA_SOURCES "")
set(FKDA_CUDA_FAMILIES "")
set(FKDA_FATBINS "")
set(FKDA_CUDA_TEXT "CPU backends only (FLASHKDA_CUDA=OFF)")
if(NOT FLASHKDA_CUDA STREQUAL "OFF")
  set(without "")
  set(toolkit 13010) # of placeholders
  if(NOT FLASHKDA_CUDA STREQUAL "HOST")
    fkda_find_nvcc(without)
    if(NOT without)
      fkda_find_cutlass(FKDA_CUTLASS_INCLUDE without)
      string(REGEX REPLACE "^([0-9]+)\\.([0-9]+)$" "\\1;\\2" parts "${FKDA_NVCC_VERSION}")
      list(GET parts 0 major)
      list(GET parts 1 minor)
      math(EXPR toolkit "1000 * ${major} + 10 * ${minor}")
    endif()
  endif()
  if(without)
    if(FLASHKDA_CUDA STREQUAL "ON")
      message(FATAL_ERROR "FLASHKDA_CUDA=ON: ${without}")
    endif()
    set(FKDA_CUDA_TEXT "CPU backends only (${without})")
  else()
    set(FKDA_WITH_CUDA 1)
    file(GLOB FKDA_CUDA_SOURCES CONFIGURE_DEPENDS src/cuda/*.c)
    file(GLOB kernels CONFIGURE_DEPENDS RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/kernels"
      src/cuda/kernels/*/*.cu)
    list(TRANSFORM kernels REPLACE "\\.cu$" "")
    if(NOT 90 IN_LIST FLASHKDA_CUDA_ARCHITECTURES AND NOT FLASHKDA_CUDA STREQUAL "HOST")
      list(FILTER kernels EXCLUDE REGEX "^sm90/")
    endif()
    set(images "${CMAKE_CURRENT_BINARY_DIR}/kernels/images.c")
    fkda_write_images("${images}" ${toolkit} ${kernels})
    if(FLASHKDA_CUDA STREQUAL "HOST")
      set(FKDA_CUDA_TEXT "CPU backends; CUDA host code with placeholders for kernels")
    else()
      set(gencode "")
      set(targets "")
      foreach(arch IN LISTS FLASHKDA_CUDA_ARCHITECTURES)
        list(APPEND gencode -gencode arch=compute_${arch},code=sm_${arch})
        list(APPEND targets sm_${arch})
      endforeach()
      foreach(arch IN LISTS FLASHKDA_CUDA_PTX)
        list(APPEND gencode -gencode arch=compute_${arch},code=compute_${arch})
        list(APPEND targets "PTX ${arch}")
      endforeach()
      foreach(kernel IN LISTS kernels)
        fkda_family(family "${kernel}")
        list(APPEND FKDA_CUDA_FAMILIES ${family})
        if(family STREQUAL "sm90") # instructions that only sm_90a has
          fkda_add_fatbin("${kernel}" -gencode arch=compute_90a,code=sm_90a)
          set(FKDA_CUDA_ARCHITECTURES_${family} 90a)
          list(APPEND targets sm_90a)
        else()
          fkda_add_fatbin("${kernel}" ${gencode})
          set(FKDA_CUDA_ARCHITECTURES_${family} ${FLASHKDA_CUDA_ARCHITECTURES})
        endif()
      endforeach()
      list(REMOVE_DUPLICATES FKDA_CUDA_FAMILIES)
      list(REMOVE_DUPLICATES targets)
      set_property(SOURCE "${images}" PROPERTY OBJECT_DEPENDS "${FKDA_FATBINS}")
      list(JOIN targets ", " targets)
      set(FKDA_CUDA_TEXT "CPU and CUDA backends (nvcc ${FKDA_NVCC_VERSION}: ${targets})")
    endif()
    list(APPEND FKDA_CUDA_SOURCES "${images}" ${FKDA_FATBINS})
  endif()
endif()
