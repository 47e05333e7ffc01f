"""Who may ask, how much, and for which models."""
