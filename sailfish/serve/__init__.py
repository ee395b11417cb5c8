"""The HTTP face of an engine: OpenAI's REST interface, its gateway and its metrics. No torch."""
