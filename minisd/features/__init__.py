"""What hooks on to the core from outside: each module works without the others."""
