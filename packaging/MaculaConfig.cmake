# find_package(Macula CONFIG) gives the targets
#   Macula::macula         the shared library
#   Macula::macula_static  the static one: tell such a program where ONNX Runtime is, for it looks beside itself
# and the variable Macula_ONNXRUNTIME, the folder of the ONNX Runtime that was installed with them.
# Every path is relative to this file, so the installed tree may be moved.

get_filename_component(_macula_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(_macula_shared "${_macula_prefix}/lib/libmacula.so.@VERSION@")
set(_macula_static "${_macula_prefix}/lib/libmacula.a")
set(Macula_ONNXRUNTIME "${_macula_prefix}/lib/onnxruntime")

foreach(_macula_file "${_macula_shared}" "${_macula_static}" "${_macula_prefix}/include/macula.h")
  if(NOT EXISTS "${_macula_file}")
    set(Macula_FOUND FALSE)
    set(Macula_NOT_FOUND_MESSAGE "${_macula_file} is missing: the installed tree is not whole")
    return()
  endif()
endforeach()

if(NOT TARGET Macula::macula)
  add_library(Macula::macula SHARED IMPORTED)
  set_target_properties(Macula::macula PROPERTIES
    IMPORTED_LOCATION "${_macula_shared}"
    IMPORTED_SONAME "libmacula.so.@SOVERSION@"
    INTERFACE_INCLUDE_DIRECTORIES "${_macula_prefix}/include")
endif()

if(NOT TARGET Macula::macula_static)
  add_library(Macula::macula_static STATIC IMPORTED)
  set_target_properties(Macula::macula_static PROPERTIES
    IMPORTED_LOCATION "${_macula_static}"
    INTERFACE_INCLUDE_DIRECTORIES "${_macula_prefix}/include"
    INTERFACE_LINK_LIBRARIES "pthread;${CMAKE_DL_LIBS};m")
endif()
