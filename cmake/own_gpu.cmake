# Architectures to compile for, from those that CMake found in this machine ("90-real", say). Hopper's own instructions,
# which the codebook search uses, exist in 90a only; on other GPUs nothing of the sort is used.
function(vqsa_own_gpu found out)
  if(NOT found MATCHES "^[0-9]+-real(;[0-9]+-real)*$")
    message(FATAL_ERROR "VQSA_CUDA_ARCHS is native, but no GPU can be asked for its architecture here (${found}); see "
      "whether nvidia-smi finds one, or name the architectures: VQSA_CUDA_ARCHS=90a-real for an H100 or H200")
  endif()
  list(TRANSFORM found REPLACE "^90-" "90a-")
  set(${out} "${found}" PARENT_SCOPE)
endfunction()
