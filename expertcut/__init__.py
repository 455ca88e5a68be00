"""expertcut: make a Mixture-of-Experts checkpoint smaller or faster and keep it loadable by ordinary runtimes."""

__version__ = "0.1.0"
