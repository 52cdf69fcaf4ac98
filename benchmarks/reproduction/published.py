"""What arXiv 2402.02364 reports for its linear-regression transformer (K = 8, model seed 1), beside what `icl.analysis.stages` has."""

NUM_PARAMETERS = 51_717
NUM_CHECKPOINTS = 190
NUM_CHAINS = 10

END_LOSS = 1.74
"""On the evaluator's sequences."""

LOSS_FLOOR = 1.73
LOW_NOISE_LOSS = 1.52
"""At the end, on the validation sequences of the reference code."""

LOW_NOISE = 0.125
"""Standard deviation of the label noise of those sequences. In training 0.125 is the variance."""

# The table of stages.
CHANGE_OF_LOSS = {"LR1": -0.32, "LR2": -2.21, "LR3": -0.07, "LR4": -0.05, "LR5": -0.029}
CHANGE_OF_LLC = {"LR1": 21.4, "LR2": 149.0, "LR3": -12.3, "LR4": -44.1, "LR5": 3.56}

NBETA = 66.7

EXPLAINED_VARIANCE = (0.65, 0.08, 0.05)
"""Of the first principal components of the outputs over training."""

HEADS = (10_000, 40_000)
"""Between these steps heads specialise."""

FORMS = (2_500, 34_500, 106_100, 168_900)
"""Steps of the forms: vertices of the evolute, chosen from a list by eye."""
