"""Optional features, built on the core without changing it."""
