"""Native CPU code: C++ sources compiled on first use and called through ctypes (which releases the GIL).

Each has a PyTorch twin, which is used where there is no compiler. `build` compiles and caches, `random` makes the words
of the random streams, `dmmse` the posterior means of known tasks. Nothing happens at import.
"""
