"""What stands behind the page: the training runs, the samplers' settings, and how many estimates there are."""

from collections.abc import Sequence

from benchmarks.pages import markdown_table
from benchmarks.reproduction import published
from benchmarks.reproduction.comparison import LOG_TOLERANCE, RELATIVE_TOLERANCE, TOLERANCE
from benchmarks.reproduction.shipped import Shipped
from benchmarks.reproduction.stages import CERTAIN
from icl.evals import VALIDATION_SIZE
from icl.sampling.verdict import RHAT_LIMIT
from icl.tasks import zero_predictor_loss


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders stand for that many sections share."""
    config = runs[0].config
    llc, calibrated = runs[0].sampler("llc"), runs[0].sampler("llc_calibrated")
    counts = {run.seed: run.needed("llc")["chains"].value_counts().to_dict() for run in runs}
    return {
        "num_seeds": len(runs),
        "num_steps": config.num_steps,
        "num_measured": len(runs[0].needed("evals")),
        "num_grid": len(config.checkpoint_steps()),
        "task": config.task_config,
        "zero": zero_predictor_loss(config.task_config.pretrain_task()),
        "evaluator_size": len(runs[0].data.training_sequences[0]),
        "validation_size": VALIDATION_SIZE,
        "published_chains": published.NUM_CHAINS,
        "published_checkpoints": published.NUM_CHECKPOINTS,
        "low_noise_std": published.LOW_NOISE,
        "sgld": llc,
        "few_chains": min(min(each) for each in counts.values()),
        "many_chains": max(max(each) for each in counts.values()),
        "fewest_estimates": min(sum(each.values()) for each in counts.values()),
        "most_estimates": max(sum(each.values()) for each in counts.values()),
        "langevin": calibrated,
        "langevin_chains": int(runs[0].needed("llc_calibrated")["chains"].max()),
        "tolerance": TOLERANCE,
        "relative_tolerance": 100 * RELATIVE_TOLERANCE,
        "log_tolerance": LOG_TOLERANCE,
        "rhat_limit": RHAT_LIMIT,
        "certain": 100 * CERTAIN,
        "counts_table": _counts_table(counts),
    }


def _counts_table(counts: dict[int, dict[int, int]]) -> str:
    chains = sorted({number for each in counts.values() for number in each})
    rows = [[f"seed {seed}", *(str(each.get(number, 0)) for number in chains)] for seed, each in counts.items()]
    return markdown_table(["", *(f"checkpoints with {number} chains" for number in chains)], rows)
