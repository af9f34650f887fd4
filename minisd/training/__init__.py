"""Training the tiny model: the composed scenes it learns from, and the loops that train its parts."""
