"""vLLM platforms: which classes run when `--attention-backend express` is given."""
