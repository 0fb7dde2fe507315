"""`python -m fgvc`: the same as the command `fgvc`."""

from fgvc.cli import main

if __name__ == "__main__":
    main()
