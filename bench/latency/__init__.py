"""The layer on one GPU against its limit."""
