"""The law: each op in the plainest torch, float32 inside."""
