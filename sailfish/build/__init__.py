"""From a checkpoint to an engine directory, for a device that may be elsewhere."""
