# CUTLASS headers for the CUDA kernels: only its instruction layer is used (cute/arch, cutlass/arch).
# fkda_find_cutlass(<include dir out> <why not out>) looks, in this order, at
#   CUTLASS_DIR (cache or environment): a CUTLASS checkout, or its include directory
#   the installed Python package nvidia-cutlass, in the pinned version
#   the pinned wheel, downloaded with pip (without what it depends on) into FLASHKDA_CACHE_DIR
set(FKDA_CUTLASS_VERSION 4.2.0)
set(FKDA_CUTLASS_WHEEL nvidia_cutlass-4.2.0.0-py3-none-any.whl)
set(FKDA_CUTLASS_SHA256 f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6)
set(FKDA_CUTLASS_IN_WHEEL cutlass_library/source/include)
set(CUTLASS_DIR "" CACHE PATH "CUTLASS headers; empty: the installed nvidia-cutlass, or pip's")

# The version of the headers below `include`, for example 4.2.0; empty if there are none.
function(fkda_cutlass_version include out)
  set(${out} "" PARENT_SCOPE)
  if(NOT EXISTS "${include}/cutlass/version.h" OR NOT EXISTS "${include}/cute/config.hpp")
    return()
  endif()
  file(READ "${include}/cutlass/version.h" text)
  set(parts "")
  foreach(part MAJOR MINOR PATCH)
    string(REGEX MATCH "#define CUTLASS_${part} +([0-9]+)" _ "${text}")
    list(APPEND parts "${CMAKE_MATCH_1}")
  endforeach()
  list(JOIN parts "." version)
  set(${out} "${version}" PARENT_SCOPE)
endfunction()

function(fkda_find_cutlass out why)
  set(${out} "" PARENT_SCOPE)
  set(dir "${CUTLASS_DIR}")
  if(NOT dir)
    set(dir "$ENV{CUTLASS_DIR}")
  endif()
  if(dir)
    foreach(include "${dir}" "${dir}/include")
      fkda_cutlass_version("${include}" version)
      if(version)
        if(NOT version STREQUAL FKDA_CUTLASS_VERSION)
          message(STATUS "CUTLASS ${version} in ${include}; ${FKDA_CUTLASS_VERSION} is what was tested")
        endif()
        set(${out} "${include}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
    set(${why} "CUTLASS_DIR=${dir}: no cutlass/version.h and cute/config.hpp there or in include/"
      PARENT_SCOPE)
    return()
  endif()

  set(fetched "${FLASHKDA_CACHE_DIR}/cutlass-${FKDA_CUTLASS_VERSION}")
  set(include "${fetched}/${FKDA_CUTLASS_IN_WHEEL}")
  fkda_cutlass_version("${include}" version)
  if(version)
    set(${out} "${include}" PARENT_SCOPE)
    return()
  endif()

  set(manual "give -DCUTLASS_DIR=<directory>, or pip install nvidia-cutlass==4.2.0.0")
  find_program(FKDA_PYTHON NAMES python3 python NO_CMAKE_SYSTEM_PATH)
  mark_as_advanced(FKDA_PYTHON)
  if(NOT FKDA_PYTHON)
    set(${why} "no CUTLASS headers, and no Python to fetch them with: ${manual}" PARENT_SCOPE)
    return()
  endif()
  execute_process(
    COMMAND ${FKDA_PYTHON} -c "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  fkda_cutlass_version("${package}/source/include" version)
  if(version STREQUAL FKDA_CUTLASS_VERSION)
    set(${out} "${package}/source/include" PARENT_SCOPE)
    return()
  endif()

  message(STATUS "Downloading the CUTLASS ${FKDA_CUTLASS_VERSION} headers (nvidia-cutlass, 6 MB) with pip")
  file(MAKE_DIRECTORY "${fetched}")
  execute_process(
    COMMAND ${FKDA_PYTHON} -m pip download --quiet --disable-pip-version-check --no-deps
      --only-binary=:all: --dest "${fetched}" nvidia-cutlass==4.2.0.0
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(wheel "${fetched}/${FKDA_CUTLASS_WHEEL}")
  if(NOT result EQUAL 0 OR NOT EXISTS "${wheel}")
    string(STRIP "${output}" output)
    string(REGEX REPLACE "^.*\n" "" output "${output}")
    set(${why} "pip could not download nvidia-cutlass==4.2.0.0 (${output}): ${manual}" PARENT_SCOPE)
    return()
  endif()
  file(SHA256 "${wheel}" sum)
  if(NOT sum STREQUAL FKDA_CUTLASS_SHA256)
    file(REMOVE "${wheel}")
    set(${why} "nvidia-cutlass==4.2.0.0 has SHA-256 ${sum}, expected ${FKDA_CUTLASS_SHA256}: ${manual}"
      PARENT_SCOPE)
    return()
  endif()
  # Only what the kernels need, and complete or not at all.
  file(REMOVE_RECURSE "${fetched}/unpacking")
  file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${fetched}/unpacking"
    PATTERNS "${FKDA_CUTLASS_IN_WHEEL}/cute/*" "${FKDA_CUTLASS_IN_WHEEL}/cutlass/*")
  file(RENAME "${fetched}/unpacking/cutlass_library" "${fetched}/cutlass_library")
  file(REMOVE_RECURSE "${fetched}/unpacking")
  file(REMOVE "${wheel}")
  set(${out} "${include}" PARENT_SCOPE)
endfunction()
