"""What each screen says and offers, as values: title, verdict, facts, rows, choices, keys. No drawing.

All words that the operator reads live here; the full-screen console and the plain text show the same.
"""
