"""`python -m icl` is the command `icl`."""

from icl.cli import main

if __name__ == "__main__":
    main()
