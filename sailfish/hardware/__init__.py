"""What the machine is and has: probes, profiles of absent devices, timers, memory readers, checks."""
