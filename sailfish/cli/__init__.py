"""The `sailfish` command: one short file per command, no logic."""
