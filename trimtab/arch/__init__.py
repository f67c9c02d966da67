"""Blocks of papers on architectures, plain torch modules, a paper a file."""
