"""Making a result known: the model card, and the way to the Hub. No torch, no transformers."""
