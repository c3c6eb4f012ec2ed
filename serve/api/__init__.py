"""The OpenAI-compatible endpoint over an AsyncEngine."""
