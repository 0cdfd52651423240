"""The HTTP server: OpenAI's routes, administration, admission control, metrics."""
