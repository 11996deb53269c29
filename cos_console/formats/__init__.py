"""Bytes to values and back. These modules know formats and nothing of cOS; each names its source."""
