"""The evidence of a run, for a reader."""
