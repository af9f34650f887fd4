"""The programs: command line, batches, the page in the browser."""
