"""What each runtime accepts: rules, and the lint that applies them to a checkpoint."""
