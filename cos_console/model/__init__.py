"""The nouns: frozen, typed values that every room shares. No I/O, no drawing."""
