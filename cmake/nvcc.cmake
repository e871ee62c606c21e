# BIGMODEL_NVCC: CUDACXX, then nvcc in CUDA_HOME, in CUDA_PATH, on PATH, in /usr/local/cuda, then that of the PyPI wheels
# nvidia-cuda-nvcc, -crt, -runtime, -cccl and nvidia-nvvm, which an isolated build can only look up by path: wheel_root.
# bench/gpu/machine.py looks in the same places.
execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
  OUTPUT_VARIABLE purelib OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(wheel_root "${purelib}/nvidia/cu13")
if(DEFINED ENV{CUDACXX})
  set(BIGMODEL_NVCC "$ENV{CUDACXX}")
else()
  set(homes)
  foreach(variable CUDA_HOME CUDA_PATH)
    if(DEFINED ENV{${variable}})
      list(APPEND homes "$ENV{${variable}}/bin")
    endif()
  endforeach()
  find_program(BIGMODEL_NVCC nvcc HINTS ${homes} PATHS /usr/local/cuda/bin "${wheel_root}/bin")
endif()
