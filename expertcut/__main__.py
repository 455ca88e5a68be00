"""`python -m expertcut` is the command `expertcut`."""

from expertcut.cli import main

if __name__ == "__main__":
    main()
