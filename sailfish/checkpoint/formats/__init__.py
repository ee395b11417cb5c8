"""Quantised linear layers as other tools store them: GPTQ, AWQ and compressed-tensors, read and written."""
