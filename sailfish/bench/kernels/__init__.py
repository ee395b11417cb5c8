"""Measures single kernels as the engine runs them: chosen by shape, captured in CUDA graphs, data rotated."""
