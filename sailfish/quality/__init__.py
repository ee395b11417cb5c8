"""How good a model is, and how near its parent it stays: metrics with intervals over windows of text."""
