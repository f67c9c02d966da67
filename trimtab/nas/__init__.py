"""Architecture search: elastic networks, and what chooses among their sub-networks."""
