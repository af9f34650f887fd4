"""Reading and writing of checkpoints, model folders and adapters, and downloads from the Hugging Face Hub."""
