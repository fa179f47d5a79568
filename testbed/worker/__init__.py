"""The built-in worker: models, data and the training loop."""
