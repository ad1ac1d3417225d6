"""For tests/ and bench/ alone: inputs, tolerance, and worker ranks that stay alive."""
