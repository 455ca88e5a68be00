"""What needs a forward pass after planning: held-out loss of models and plans, numeric verification."""
