"""The one door to device code: block kernels, operations that a CPU needs, BLAS, the device."""
