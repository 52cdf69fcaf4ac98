"""The pictures and outputs of the concept pages: each page's own code is run, and its results are drawn.

python -m docs.make_pictures [PAGE]       # such as sampling; default: all. Run it in the folder of the repository.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from docs.code_of_pages import run_page, with_outputs
from icl.figures.style import MODEL, OPTIMAL, OTHER, ZERO, page, panels, save, shades

DOCS = Path(__file__).resolve().parent
CONCEPTS, PICTURES = DOCS / "concepts", DOCS / "pictures"
Names = Mapping[str, Any]


def in_context_learning(names: Names) -> Figure:
    """Loss by the place in the list, early and late in training."""
    figure, (axis,) = panels(1, 1, width=4.5, height=2.6)
    places = range(1, len(names["ridge"]) + 1)
    axis.plot(places, names["early"], "o-", ms=4, color=ZERO, label="step 984")
    axis.plot(places, names["late"], "o-", ms=4, color=MODEL, label="step 499,999")
    axis.plot(places, names["ridge"], "--", color=OPTIMAL, label="ridge regression (the best possible)")
    axis.set(xlabel="place in the list", ylabel="mean squared error", ylim=(0, None))
    axis.legend(loc="lower left")
    return figure


def learning_coefficient(names: Names) -> Figure:
    """Two losses of one weight, and the share of weights below a loss."""
    figure, (left, right) = panels(1, 2, width=5.6, height=2.2)
    w = names["w"]
    levels = torch.logspace(-5, -1, 30, dtype=w.dtype)
    fine = torch.linspace(-1, 1, 400_001, dtype=w.dtype)
    for power, colour, slope in ((2, MODEL, "1/2"), (4, ZERO, "1/4")):
        inside = w[w.abs() <= 1]
        left.plot(inside, inside**power, color=colour, label=f"$w^{power}$")
        share = [(fine.abs() ** power < level).double().mean() for level in levels]
        right.plot(levels, share, color=colour, label=f"$w^{power}$: slope {slope}")
    left.axhline(0.05, color=OTHER, ls=":")
    left.annotate(
        "the room below\nthis loss",
        (0, 0.06),
        (0, 0.3),
        ha="center",
        arrowprops={"arrowstyle": "->", "color": OTHER},
    )
    left.set(xlabel="$w$", ylabel="loss", ylim=(-0.03, 1))
    right.set(xlabel=r"$\delta$", ylabel=r"share of weights with loss < $\delta$", xscale="log", yscale="log")
    for axis in (left, right):
        axis.legend()
    return figure


def sampling(names: Names) -> Figure:
    """The draws of one chain on the contours of the loss, and the running estimates of all chains."""
    figure, (left, right) = panels(1, 2, width=5.6, height=2.5)
    loss, chains, nbeta = names["loss"], torch.stack(names["chains"]), names["nbeta"]
    draws = names["draws"][::8, 0]
    steep, soft = torch.linspace(-0.8, 0.8, 90), torch.linspace(-1.3, 1.3, 90)
    grid = torch.stack(torch.meshgrid(soft, steep, indexing="xy")[::-1], dim=-1)
    left.contour(soft, steep, nbeta * loss(grid), levels=[0.5, 1, 2, 4, 8], colors=OTHER, linewidths=0.6)
    left.plot(draws[:, 1], draws[:, 0], ".", ms=2, color=MODEL, label="draws")
    left.plot(0, 0, "+", ms=9, mew=2, color=ZERO, label="$w^*$")
    left.set(xlabel="soft direction", ylabel="steep direction", aspect="equal")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    excess = nbeta * loss(chains)
    running = excess.cumsum(dim=0) / torch.arange(1, len(excess) + 1)[:, None]
    right.plot(running, color=MODEL, lw=0.7)
    right.plot([], [], color=MODEL, label="one chain each")
    right.axhline(float(names["exact"]), color=OPTIMAL, ls="--", label="exact")
    right.axvspan(0, 1000, color=OTHER, alpha=0.2, lw=0, label="burn-in")
    right.set(xlabel="step", ylabel=r"$\hat\lambda$ so far", xlim=(0, len(excess)))
    right.legend(loc="upper right")
    return figure


def nbeta_and_gamma(names: Names) -> Figure:
    """The exact estimate for a sum of bowls over γ."""
    figure, (axis,) = panels(1, 1, width=4.5, height=2.7)
    gammas = torch.logspace(-2, 5, 200)
    for nbeta, colour in zip((10, 100, 1000), shades("viridis", 3), strict=True):
        axis.plot(
            gammas,
            [names["estimate"](nbeta, float(gamma)) for gamma in gammas],
            color=colour,
            label=f"$n\\beta$ = {nbeta}",
        )
    axis.axhline(2.5, color=OPTIMAL, ls="--", label=r"true $\lambda$")
    axis.set(xscale="log", xlabel=r"localisation $\gamma$", ylabel=r"$\hat\lambda$", ylim=(0, None))
    axis.legend()
    return figure


def verdicts(names: Names) -> Figure:
    """Running estimates of every chain, for each setting."""
    figure, axes = panels(1, 3, width=5.6, height=2.1, sharey=True)
    for axis, (name, result) in zip(axes, names["results"].items(), strict=True):
        axis.plot(result.running.T, color=MODEL, lw=0.8)
        axis.axhline(2.5, color=OPTIMAL, ls="--")
        axis.set(title=name, xlabel="draw", ylim=(0, 7))
    axes[0].set_ylabel(r"$\hat\lambda$ so far, each chain")
    return figure


DRAWN: Mapping[str, Callable[[Names], Figure]] = {
    "in-context-learning": in_context_learning,
    "learning-coefficient": learning_coefficient,
    "sampling": sampling,
    "nbeta-and-gamma": nbeta_and_gamma,
    "verdicts": verdicts,
}


def main(chosen: list[str]) -> None:
    for name in chosen or DRAWN:
        path = CONCEPTS / f"{name}.md"
        names, outputs = run_page(path)
        path.write_text(with_outputs(path.read_text(encoding="utf-8"), outputs), encoding="utf-8")
        with page():
            save(DRAWN[name](names), PICTURES, name, kinds=("png",))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="*", help=f"of {', '.join(DRAWN)}; default: all")
    main(parser.parse_args().page)
