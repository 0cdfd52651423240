"""`python -m graftlm.cli`."""

from graftlm.cli import main

if __name__ == "__main__":
    main()
