# Runs nvcc for one file of kernels and reads what ptxas says:
#   cmake -D OUTPUT=<path without extension> -D SOURCE=<file.cu> -D PROJECT=<root> -D CACHE=<directory>
#         -D ALLOW_SPILLS=<bool> -P build_fatbin.cmake -- <nvcc and its flags>
# Makes OUTPUT.fatbin, OUTPUT.log and OUTPUT.d. Fails on a compile error, a register spill, a ptxas message
# C75xx (serialised wgmma), or if no entry point came out.
#
# The result is kept in CACHE under a hash of the compiler's version, the command and every project
# file that may be included, so that other build directories need not compile it again.
cmake_minimum_required(VERSION 3.25)

set(command "")
set(rest FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(rest)
    list(APPEND command "${CMAKE_ARGV${i}}")
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(rest TRUE)
  endif()
endforeach()

# ---- what ptxas says ------------------------------------------------------------------------------------

# Sets `problems` (a list of lines) from the text of a log.
function(fkda_check_ptxas log out)
  set(problems "")
  set(entries 0)
  set(architecture "")
  set(function "")
  string(REPLACE ";" "," log "${log}")
  string(REPLACE "[" "(" log "${log}")
  string(REPLACE "]" ")" log "${log}")
  string(REPLACE "\n" ";" lines "${log}")
  foreach(line IN LISTS lines)
    if(line MATCHES "Compiling entry function '([^']*)' for '([^']*)'")
      math(EXPR entries "${entries} + 1")
      set(architecture "${CMAKE_MATCH_2}")
    elseif(line MATCHES "Function properties for (.*)$")
      set(function "${CMAKE_MATCH_1}")
    elseif(line MATCHES "([0-9]+) bytes spill stores, ([0-9]+) bytes spill loads")
      if((CMAKE_MATCH_1 GREATER 0 OR CMAKE_MATCH_2 GREATER 0) AND NOT ALLOW_SPILLS)
        list(APPEND problems "${architecture} ${function}: spills ${CMAKE_MATCH_1} bytes, reloads ${CMAKE_MATCH_2}")
      endif()
    elseif(line MATCHES "C75[0-9][0-9]")
      list(APPEND problems "${line}")
    endif()
  endforeach()
  if(entries EQUAL 0)
    list(APPEND problems "no entry point was compiled")
  endif()
  set(${out} "${problems}" PARENT_SCOPE)
endfunction()

function(fkda_check_log)
  file(READ "${OUTPUT}.log" log)
  fkda_check_ptxas("${log}" problems)
  if(problems)
    file(REMOVE "${OUTPUT}.fatbin")
    list(JOIN problems "\n  " problems)
    message(FATAL_ERROR "${SOURCE}:\n  ${problems}\n(FLASHKDA_CUDA_ALLOW_SPILLS=ON lets spills pass; all of "
      "ptxas's words are in ${OUTPUT}.log)")
  endif()
endfunction()

# ---- compiling, or taking it from the cache -------------------------------------------------------------

# What all kernels share, and what lies beside this one; for those of the backward, portable's headers of it.
get_filename_component(beside "${SOURCE}" DIRECTORY)
file(GLOB_RECURSE files LIST_DIRECTORIES false "${PROJECT}/include/*.h" "${beside}/*.h" "${beside}/*.cuh")
file(GLOB shared LIST_DIRECTORIES false "${PROJECT}/src/cuda/kernels/*.h" "${PROJECT}/src/cuda/kernels/*.cuh")
if(SOURCE MATCHES "/backward_[^/]*$")
  set(portable "${PROJECT}/src/cuda/kernels/portable")
  file(GLOB backward "${portable}/backward_*.h" "${portable}/backward_*.cuh")
  list(APPEND shared ${backward})
endif()
list(APPEND files ${shared} "${PROJECT}/src/check/problem.h" "${SOURCE}")
list(SORT files)
list(REMOVE_DUPLICATES files)

function(fkda_key out)
  list(GET command 0 nvcc)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text)
  set(flags "${command}")
  list(REMOVE_AT flags 0) # not by which way nvcc was found
  string(APPEND text "${SOURCE} ${flags}\n")
  foreach(file IN LISTS files)
    file(SHA256 "${file}" sum)
    string(APPEND text "${sum} ${file}\n")
  endforeach()
  string(SHA256 key "${text}")
  set(${out} "${key}" PARENT_SCOPE)
endfunction()

fkda_key(key)
get_filename_component(stem "${OUTPUT}" NAME)
set(kept "${CACHE}/${stem}-${key}")

if(EXISTS "${kept}/done")
  foreach(extension fatbin log d)
    configure_file("${kept}/${stem}.${extension}" "${OUTPUT}.${extension}" COPYONLY)
    file(TOUCH "${OUTPUT}.${extension}")
  endforeach()
  # The dependency file names the output of whoever made it.
  file(READ "${OUTPUT}.d" dependencies)
  string(REGEX REPLACE "^[^:]*:" "${OUTPUT}.fatbin:" dependencies "${dependencies}")
  file(WRITE "${OUTPUT}.d" "${dependencies}")
  fkda_check_log()
  return()
endif()

file(REMOVE "${OUTPUT}.fatbin")
execute_process(
  COMMAND ${command} --fatbin -MD -MF "${OUTPUT}.d" -MT "${OUTPUT}.fatbin" -o "${OUTPUT}.fatbin" "${SOURCE}"
  RESULT_VARIABLE result OUTPUT_VARIABLE log ERROR_VARIABLE log)
file(WRITE "${OUTPUT}.log" "${log}")
if(NOT result EQUAL 0)
  file(REMOVE "${OUTPUT}.fatbin")
  message(FATAL_ERROR "nvcc failed on ${SOURCE}:\n${log}")
endif()

# A file outside of the hash would make the cache answer wrongly.
file(READ "${OUTPUT}.d" dependencies)
string(REGEX MATCHALL "[^ \\\n]+" dependencies "${dependencies}")
foreach(file IN LISTS dependencies)
  cmake_path(IS_PREFIX PROJECT "${file}" NORMALIZE inside)
  if(inside AND NOT file IN_LIST files AND NOT file STREQUAL "${OUTPUT}.fatbin" AND NOT file MATCHES "/cutlass-")
    file(REMOVE "${OUTPUT}.fatbin")
    message(FATAL_ERROR "${SOURCE} includes ${file}, which cmake/build_fatbin.cmake does not hash")
  endif()
endforeach()

fkda_key(key_now)
if(key_now STREQUAL key) # nobody edited a file meanwhile
  string(RANDOM LENGTH 12 suffix)
  set(making "${kept}.${suffix}")
  file(MAKE_DIRECTORY "${making}")
  foreach(extension fatbin log d)
    configure_file("${OUTPUT}.${extension}" "${making}/${stem}.${extension}" COPYONLY)
  endforeach()
  file(TOUCH "${making}/done")
  file(RENAME "${making}" "${kept}" RESULT result) # fails where another build was first
  file(REMOVE_RECURSE "${making}")
endif()
fkda_check_log()
