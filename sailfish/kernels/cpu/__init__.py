"""Kernels for the CPU: one small C++ library, and the Python that calls it."""
