"""Record a run, fingerprint its parameters, and train it again to compare the bits."""
