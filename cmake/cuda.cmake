# The CUDA half: finds nvcc and picks the architectures.
# find_package(CUDAToolkit) fails on those wheels and is not needed: nothing but cudart is linked.
set(BIGMODEL_WITH_CUDA 0)
set(BIGMODEL_CUDA_ARCHITECTURES "")
if(BIGMODEL_CUDA STREQUAL "OFF")
  set(BIGMODEL_CUDA_STATUS "not built: BIGMODEL_CUDA=OFF")
  return()
endif()

include(cmake/nvcc.cmake)
if(NOT BIGMODEL_NVCC)
  if(BIGMODEL_CUDA STREQUAL "ON")
    message(FATAL_ERROR "BIGMODEL_CUDA=ON, but nvcc is neither in CUDACXX, CUDA_HOME or CUDA_PATH, nor on PATH, nor in "
      "/usr/local/cuda, nor in ${wheel_root}/bin.")
  endif()
  set(BIGMODEL_CUDA_STATUS "not built: no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, on PATH or from PyPI")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE no_gpu)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
  if(no_gpu EQUAL 0 AND capabilities)
    list(REMOVE_DUPLICATES capabilities)
    string(REPLACE "." "" capabilities "${capabilities}")
    list(TRANSFORM capabilities APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  endif()
endif()

set(CMAKE_CUDA_COMPILER "${BIGMODEL_NVCC}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
cmake_path(IS_PREFIX wheel_root "${BIGMODEL_NVCC}" nvcc_from_wheel)
if(nvcc_from_wheel)
  # The wheels keep libcudart_static.a in lib/, where nvcc's own profile does not look.
  set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${wheel_root}/lib")
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " BIGMODEL_CUDA_ARCHITECTURES)

list(TRANSFORM BIGMODEL_OPS REPLACE "(.+)" "csrc/cuda/\\1.cu" OUTPUT_VARIABLE cuda_sources)
add_library(bigmodel_cuda STATIC csrc/cuda/device.cu ${cuda_sources})
target_compile_options(bigmodel_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all>)
# device.cu names them to the owner of a device that they leave out.
target_compile_definitions(bigmodel_cuda PRIVATE "BIGMODEL_CUDA_ARCHITECTURES=\"${BIGMODEL_CUDA_ARCHITECTURES}\"")
set(BIGMODEL_WITH_CUDA 1)
set(BIGMODEL_CUDA_STATUS "built with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${BIGMODEL_CUDA_ARCHITECTURES}")
