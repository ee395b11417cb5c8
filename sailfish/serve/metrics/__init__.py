"""What the server measures of itself, in Prometheus' text format."""
