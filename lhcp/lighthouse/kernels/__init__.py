"""Triton kernels of the local stages. Each launcher allocates, builds a grid and launches."""
