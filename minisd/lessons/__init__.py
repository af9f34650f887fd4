"""What the notebooks need beside figures: the checks of their exercises."""
