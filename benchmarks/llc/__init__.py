"""How good the estimator is where the coefficient is known: accuracy, bias, errors, cost."""

NUM_SAMPLES = 2**17
"""n, of nβ = n / log n: the models' losses are those of endless data."""
