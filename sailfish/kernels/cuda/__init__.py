"""CUDA C++ kernels, compiled by NVRTC for the card that is there, and their Python skins."""
