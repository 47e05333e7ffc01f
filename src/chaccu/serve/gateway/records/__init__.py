"""What was asked and answered, kept where that is asked for."""
