"""Exact attention across ranks; no word of lighthouse."""
