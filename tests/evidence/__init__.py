"""Proofs of correctness that are run by hand, and the tests that they name what is wrong."""
