"""OpenAI's chat and text completions, spoken exactly."""
