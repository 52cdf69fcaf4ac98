"""Native CPU code: C++ sources, compiled on first use and called through ctypes, which releases the GIL.

Each has an equivalent in PyTorch, which is used if there is no compiler. `build` compiles and caches. `random` makes the
bits of the random streams. `dmmse` computes posterior means over known tasks. Nothing happens at import.
"""
