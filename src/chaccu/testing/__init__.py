"""What tests build on: real processes to start and stop, models that cost nothing."""
