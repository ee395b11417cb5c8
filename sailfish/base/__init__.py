"""Errors, configuration, units, logging and spans: the standard library only."""
