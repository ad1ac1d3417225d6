"""Partial results of one attention, merged; parts of gradients, summed."""
