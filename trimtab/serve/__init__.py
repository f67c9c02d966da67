"""Policies of serving: who is admitted, which adapters are in the pool, how prompts are packed."""
