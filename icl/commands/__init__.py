"""The commands of `icl`, one file each. The command line itself is in `icl.cli`."""
