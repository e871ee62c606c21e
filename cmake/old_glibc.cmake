# BIGMODEL_OLD_GLIBC: the release link, for a wheel that runs where glibc is older than on the machine that builds it.
#
# The linker binds a function to the newest version that the first library on its line defines. Libraries of nothing but
# names, in front of glibc, define the versions that these functions have had since their port's first glibc; every
# later one keeps them (glibc 2.34 moved threads and dlopen into libc.so.6, 2.29 gave exp, log and pow new versions).
# libstdc++ is linked in, its symbols hidden, for the same reason. auditwheel checks the result (make wheel).
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  set(versions "GLIBC_2.2.5 { *; }; GLIBC_2.3.4 { dlmopen; };\n")
else()
  set(versions "GLIBC_2.17 { *; };\n")
endif()

function(bigmodel_old_functions name soname)
  set(target bigmodel_old_${name})
  set(source ${CMAKE_CURRENT_BINARY_DIR}/${target})
  list(TRANSFORM ARGN REPLACE "(.+)" "extern \"C\" void \\1() {}\n" OUTPUT_VARIABLE functions)
  list(JOIN functions "" functions)
  file(CONFIGURE OUTPUT ${source}.cpp CONTENT "${functions}" @ONLY)
  file(CONFIGURE OUTPUT ${source}.map CONTENT "${versions}" @ONLY)
  add_library(${target} SHARED ${source}.cpp)
  set_target_properties(${target} PROPERTIES NO_SONAME ON CXX_VISIBILITY_PRESET default)
  target_compile_options(${target} PRIVATE -fno-builtin)
  target_link_options(${target} PRIVATE -nostdlib -Wl,-soname,${soname} -Wl,--version-script=${source}.map)
  target_link_libraries(_C PRIVATE ${target})
  target_link_libraries(_planner PRIVATE ${target})
endfunction()

# What the static CUDA runtime and the kernels call; auditwheel's verdict names the version of one that is missing here.
bigmodel_old_functions(m libm.so.6 exp log pow)
bigmodel_old_functions(rt librt.so.1 shm_open shm_unlink)
bigmodel_old_functions(dl libdl.so.2 dlclose dlerror dlmopen dlopen dlsym dlvsym)
bigmodel_old_functions(pthread libpthread.so.0
  pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create
  pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
  pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
  pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock
  pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy
  pthread_rwlockattr_init pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
  pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait
  sem_wait)

# libstdc++'s headers ask this variable of glibc 2.32 whether counting references may do without atomics: never. A
# libstdc++.a built with glibc 2.38 or later calls strtoul by the name that C23 gave it there.
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/newer_glibc.cpp CONTENT [[
#define HIDDEN extern "C" __attribute__((visibility("hidden")))
HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;
extern "C" unsigned long strtoul(const char*, char**, int);
HIDDEN unsigned long __isoc23_strtoul(const char* text, char** end, int base) { return strtoul(text, end, base); }
]] @ONLY)
foreach(module _C _planner)
  target_sources(${module} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/newer_glibc.cpp)
  # Without the collection of unused sections, parts of libstdc++ that nothing calls would ask for glibc 2.36. Some
  # compilers drop a library that nothing before it needs, and the CUDA runtime comes after these.
  target_link_options(${module} PRIVATE
    -Wl,--no-as-needed -static-libstdc++ -Wl,--exclude-libs,libstdc++.a -Wl,--gc-sections)
endforeach()
