"""Implementations in plain torch that are faster or smaller than the reference; no device is assumed."""
