"""`icl presets`: the named settings of the sampler."""

from icl.sampling.presets import PRESETS

ABOUT = {
    "published": "The settings of arXiv 2402.02364, for its transformers. At early checkpoints the chains leave the region of the weights.",
    "published-table": "The same, with the burn-in that the paper's table names. Its public code ignored it. γ is that of the code.",
    "calibrated": "For the same transformers. Chains stay near the weights at every checkpoint. Takes about a minute per checkpoint.",
    "automatic": "For any model. Short pilot chains choose the constants, and draws go on until the error is small. Slowest.",
    "published-language": "The settings of arXiv 2402.02364 for its language models, with an artefact of its estimator. Only to compare.",
    "calibrated-language": "For language models. Short pilot chains choose step size and localisation.",
}
SHOWN = (
    "sampling_method",
    "num_chains",
    "num_burnin_steps",
    "num_draws",
    "grad_batch_size",
    "epsilon",
    "gamma",
    "nbeta",
    "target_error",
)


def print_presets() -> None:
    """Print every preset, its purpose and its settings."""
    for name, sampler in PRESETS.items():
        print(f"{name}: {ABOUT[name]}")
        values = {key: getattr(sampler, key) for key in SHOWN}
        shown = {
            key: f"{value:g}" if isinstance(value, float) else value
            for key, value in values.items()
            if value is not None
        }
        print("  " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    print(
        "Use one with `icl llc FILE --preset NAME`, or in a sweep file with preset: {value: NAME}. --set changes single settings."
    )
    print("`icl llc FILE --preset NAME --dry-run` says how long it takes on this machine.")
