"""The reference: NumPy code that defines what every spec and operation means."""
