"""Decoding of sequences: sampling, beam search, and parameters arranged for their loops."""
