"""The express attention backend: metadata, worker and the kernels of each device."""
