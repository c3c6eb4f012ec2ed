"""Serve a checkpoint that `compress` made, or a plain Hugging Face folder, behind OpenAI's API."""
