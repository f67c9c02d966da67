"""Caches of keys and values: what of them is kept, and how."""
