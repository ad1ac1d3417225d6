"""A training step of the paper's decoder: dense against lighthouse, on one device and on ranks."""
