"""Context parallelism for a model and its training step: one object that knows group and layout."""
