"""What each command of `icl` does; the command line itself is `icl.cli`."""
