"""The decoder's parts."""
