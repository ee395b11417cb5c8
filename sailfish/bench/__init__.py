"""Measures: the engine's baseline, the demo, and the walk of one request."""
