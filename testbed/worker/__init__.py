"""What runs as a worker: the built-in program with its models and data, and what ties any session
to its cell."""
