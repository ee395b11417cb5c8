"""The paged KV cache as plain integers: which block holds what, and who refers to it."""
