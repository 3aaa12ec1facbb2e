"""The record of a run, fingerprints of its parameters, and training that must give them again."""
