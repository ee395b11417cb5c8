"""Weights in fewer bits: pure functions, tensors in and tensors out."""
