"""Transformer models: attention, masks, layers, architectures, decoding."""
