"""What express adds to vLLM's OpenAI server: the request API, its own routes, metrics, a page."""
