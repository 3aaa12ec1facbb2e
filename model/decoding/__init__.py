"""From logits to sequences: sampling, beam search, and parameters as their loops read them."""
