"""Hugging Face directories in and out: config, tensors, tokenizer, chat template."""
