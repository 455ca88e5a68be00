"""What needs a forward pass after planning: what-if evaluation, gates, numeric verification; and load on engines."""
