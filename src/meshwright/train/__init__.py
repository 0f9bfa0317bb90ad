"""Training a job: the one-page loop in loop.py, and what it needs around it. Loads torch."""
