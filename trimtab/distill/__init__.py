"""Losses of a student that learns from a teacher, or from itself, a method a file."""
