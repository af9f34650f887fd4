"""Reading and writing files: checkpoints, folders, adapters, downloads."""
