"""Other people's packages and stacks, each in one file."""
