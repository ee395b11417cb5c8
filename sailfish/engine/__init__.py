"""From a request to its tokens. Opens engine directories only."""
