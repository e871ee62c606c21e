# The CPU half. csrc/cpu/<op>.isa.cpp is compiled once per instruction set into a namespace of that name;
# everything else is compiled for the baseline, so no newer instruction can leak into shared code.
#
# OpenMP is compiled in and not linked: its symbols resolve at import to the runtime that torch has already
# loaded, under whatever file name that torch wheel carries it (bigmodel._native), so there is never a second one.
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  set(BIGMODEL_ISAS v2 v3 v4)
  set(BIGMODEL_FLAGS_v2 -march=x86-64-v2)
  set(BIGMODEL_FLAGS_v3 -march=x86-64-v3)
  set(BIGMODEL_FLAGS_v4 -march=x86-64-v4)
else()
  set(BIGMODEL_ISAS neon)
  set(BIGMODEL_FLAGS_neon -march=armv8-a)
endif()

# GCC warns about its own AVX-512 headers (maybe-uninitialized) and about the ABI of internal vector arguments (psabi).
set(BIGMODEL_WARNINGS -Wall -Wextra -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized)
if(BIGMODEL_SANITIZE)
  set(BIGMODEL_SANITIZE_FLAGS -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=address,undefined)
endif()

set(isa_objects)
foreach(isa IN LISTS BIGMODEL_ISAS)
  list(TRANSFORM BIGMODEL_OPS REPLACE "(.+)" "csrc/cpu/\\1.isa.cpp" OUTPUT_VARIABLE isa_sources)
  add_library(bigmodel_cpu_${isa} OBJECT csrc/cpu/convert.isa.cpp csrc/cpu/quantise.isa.cpp ${isa_sources})
  target_compile_definitions(bigmodel_cpu_${isa} PRIVATE BIGMODEL_ISA=${isa})
  target_compile_options(bigmodel_cpu_${isa} PRIVATE
    ${BIGMODEL_FLAGS_${isa}} -O3 -fno-math-errno -fno-trapping-math ${BIGMODEL_WARNINGS} ${BIGMODEL_SANITIZE_FLAGS})
  set_property(TARGET bigmodel_cpu_${isa} PROPERTY INTERPROCEDURAL_OPTIMIZATION OFF)
  list(APPEND isa_objects $<TARGET_OBJECTS:bigmodel_cpu_${isa}>)
endforeach()

list(TRANSFORM BIGMODEL_OPS REPLACE "(.+)" "csrc/cpu/\\1.cpp" OUTPUT_VARIABLE cpu_sources)
add_library(bigmodel_cpu STATIC csrc/cpu/isa.cpp ${cpu_sources} ${isa_objects})
target_compile_options(bigmodel_cpu PRIVATE -O3 -fopenmp ${BIGMODEL_WARNINGS} ${BIGMODEL_SANITIZE_FLAGS})

# A weak symbol in a per-instruction-set object could be the copy that the linker keeps for everyone, and older
# processors would die of SIGILL.
if(NOT BIGMODEL_SANITIZE)
  add_custom_command(TARGET bigmodel_cpu POST_BUILD
    COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} "-DOBJECTS=${isa_objects}" -P ${CMAKE_CURRENT_LIST_DIR}/check_weak.cmake
    VERBATIM)
endif()
