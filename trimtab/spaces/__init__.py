"""Named spaces: networks whose choices read as the networks do."""
