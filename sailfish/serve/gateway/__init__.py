"""What stands between a socket and the endpoints: limits, the hardened protocol, keys, strict JSON."""
