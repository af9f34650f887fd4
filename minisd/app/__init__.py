"""Applications: the command line, batch jobs and the web page."""
