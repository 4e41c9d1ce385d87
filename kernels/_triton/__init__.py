"""What Triton kernels share: autotune spaces and addressing."""
