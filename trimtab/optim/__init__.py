"""Optimisers: update rules of one tensor, which `trimtab.optimizer` makes a `torch.optim.Optimizer`."""
