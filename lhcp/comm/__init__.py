"""Ranks, layouts and messages: what a sequence is cut over, and how its parts travel."""
