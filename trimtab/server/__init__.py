"""`trimtab serve`: a process that keeps watch, one that speaks HTTP, and one that runs the model; see docs/serve.md."""
