"""Refits the published points of MARS' Figure 2 with our laws, and shows what each form of Law-P would have picked.

The points are those of paper_points.py: one model, ranks of the LLM only, apparently one run a cell. It writes paper.md
(tables) and paper.svg (picture) into a folder.

    python scripts/refit_paper.py [--out docs]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from paper_points import RANKS, convergence_points, performance_points

from mars_jax.laws.law_c import ConvergenceLaw, ConvergenceTimes, fit_convergence_law, fit_data_exponent
from mars_jax.laws.law_p import PerformanceLaw, choose_form, fit_performance_law
from mars_jax.laws.resamples import resample_runs
from mars_jax.report.style import LIGHT, WIDTH, figure_style, plain_log_axis, ramp, rank_handles, to_svg
from mars_jax.runtime.jsonfiles import write_text

BOOTSTRAPS = 1000
LARGEST = (2**11, 2**12, 2**13, 2**14)
"""Largest D of the points that Law-P is fitted to; the paper's own range ends at the first."""
TARGETS = (2**12, 2**13, 2**14)
DASHES: tuple[tuple[float, Sequence[float]], ...] = ((0, ()), (0, (1, 1.5)))

Fits = dict[int, tuple[PerformanceLaw, PerformanceLaw]]


def main() -> None:
    """Writes the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    out = parser.parse_args().out
    law, fits = convergence(), performance()
    write_text(out / "paper.svg", picture(law, fits))
    write_text(out / "paper.md", page(law, fits))
    print(f"wrote {out / 'paper.md'} and {out / 'paper.svg'}")


def convergence() -> ConvergenceLaw:
    """Law-C of all points; for its intervals each of the 28 cells is a run by itself."""
    rank, samples, steps = convergence_points()
    resamples = resample_runs(jax.random.key(0), range(len(rank)), [None] * len(rank), BOOTSTRAPS)
    times = ConvergenceTimes(rank, samples, steps, np.zeros(len(rank), bool))
    return fit_convergence_law("llm", times, resamples)


def performance() -> Fits:
    """Largest D -> Law-P without and with the over-fitting term, of the points up to it, in nats."""
    rank, samples, perplexity = performance_points()
    fits = {}
    for largest in LARGEST:
        used = samples <= largest
        points = {"llm": rank[used]}, samples[used], np.log(perplexity[used])
        fits[largest] = fit_performance_law("power", *points), fit_performance_law("power_overfit", *points)
    return fits


def page(law: ConvergenceLaw, fits: Fits) -> str:
    """The tables as Markdown."""
    rank, samples, steps = convergence_points()
    slopes = [(r, *fit_data_exponent(samples[rank == r], steps[rank == r])) for r in RANKS]
    intervals = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in law.ci.items()}
    measured = best_ranks()
    rows = []
    for largest, (power, overfit) in fits.items():
        chosen = choose_form(power, overfit)
        for form in (power, overfit):
            rows.append(
                [
                    largest,
                    "power" if form is power else "with over-fitting term",
                    "yes" if form is chosen else "",
                    *(f"{value:.3f}" for value in (form.alpha["llm"], form.beta, form.E)),
                    f"{form.overfit.C:.2g}, {form.overfit.kappa['llm']:.2f}, {form.overfit.eta:.2f}"
                    if form.overfit
                    else "",
                    f"{form.held_out_error:.4f}" if form.held_out_error is not None else "",
                    f"{form.order_tau:.2f}" if form.order_tau is not None else "",
                    *(cell(form, target, largest, measured[target]) for target in TARGETS),
                ]
            )
    choices = table(
        ["fitted to D up to", "form", "chosen", "alpha", "beta", "E", "C, kappa, eta", "held out", "tau", *TARGETS],
        rows,
    )
    lines = table(["rank", "k", "delta"], [[r, f"{k:.3f}", f"{delta:.4f}"] for r, k, delta in slopes])
    return f"""<!-- Written by scripts/refit_paper.py: edit that. -->
# The paper's own points, refitted

Figure 2 of MARS (arXiv 2603.00720) shows LLaVA-OneVision 0.5B at four ranks of the LLM, 28 points a panel. These are
the fits of this project's laws to them. Nothing is said about the encoder, whose points aren't published, and each cell
looks like a single run.

![The points and the fits](paper.svg)

## Law-C: when does it converge?

As the paper draws it, a line a rank, `t = k D^delta`:

{lines}
All ranks together, `t = k r^gamma D^delta`: k = {law.k:.2f} ({intervals["k"]}), gamma = {law.gamma:.3f}
({intervals["gamma"]}), delta = {law.delta:.3f} ({intervals["delta"]}); 95 % intervals over {BOOTSTRAPS} resamples of
the points' residuals. E = {law.E:g}: the points do not ask for the offset that the paper's equation has.

## Law-P: which rank is best?

Fitted to the loss (log perplexity) up to the D of the first column. `held out` is the error in nats, and tau Kendall's
tau of the ranks' order, at the largest D of each row after a fit without it. The tool chooses between the forms by
these two: the one with the smaller error, unless it orders worse. From all points it takes the power form, whose order
is the reverse of the measured one. The last columns are the rank that the fit takes for the best, "(seen)" where D was
among its points; measured are {", ".join(f"{measured[target]} at D = {target}" for target in TARGETS)}.

{choices}
Up to D = {LARGEST[0]} a larger rank is better at every D, so the paper's form, `A / (r^alpha D^beta) + E` with alpha
above 0, takes the largest rank for the best for ever; from D = {TARGETS[1]} on the order is the reverse. No alpha above
0 can say that. The form with an over-fitting term can, but up to D = {LARGEST[0]} nothing in the points speaks for it,
and the tool doesn't choose it there: probes have to reach the D at which over-fitting sets in, or the pick is an
extrapolation.
"""


def cell(form: PerformanceLaw, target: int, largest: int, measured: int) -> str:
    """The rank with the lowest predicted loss at a D."""
    best = RANKS[int(np.argmin(form.loss([{"llm": rank} for rank in RANKS], target)))]
    return f"{best}{' (seen)' if target <= largest else ''}{'' if best == measured else ', wrong'}"


def best_ranks() -> dict[int, int]:
    """D -> the rank with the lowest measured perplexity."""
    rank, samples, perplexity = performance_points()
    return {d: int(rank[samples == d][np.argmin(perplexity[samples == d])]) for d in TARGETS}


def table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def picture(law: ConvergenceLaw, fits: Fits) -> str:
    """Both panels of the figure with our fits, as SVG; Law-P's are of D up to the paper's range."""
    with figure_style():
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = ramp(RANKS)
        rank, samples, steps = convergence_points()
        line = np.geomspace(samples.min(), samples.max(), 40)
        for r in RANKS:
            left.plot(samples[rank == r], steps[rank == r], "o", color=colours[r])
            left.plot(line, [float(np.exp(law.log_steps(r, d))) for d in line], color=colours[r])
        plain_log_axis(left, "x", sorted(set(samples.tolist())))
        plain_log_axis(left, "y", [10, 20, 50, 100, 200, 500])
        left.set(title="Law-C, all ranks together", xlabel="samples D", ylabel="steps to convergence")

        rank, samples, perplexity = performance_points()
        line = np.geomspace(samples.min(), samples.max(), 60)
        for r in RANKS:
            right.plot(samples[rank == r], perplexity[rank == r], "o", color=colours[r])
            for form, dashes in zip(fits[LARGEST[0]], DASHES, strict=True):
                fitted = [np.exp(form.loss([{"llm": r}], d)[0]) for d in line]
                right.plot(line, fitted, color=colours[r], linestyle=dashes)
        right.axvline(LARGEST[0], color=LIGHT["muted"], linewidth=0.8)
        plain_log_axis(right, "x", sorted(set(samples.tolist())))
        plain_log_axis(right, "y", [2.5, 3, 3.5, 4, 4.5])
        right.set_ylim(2.4, 5)
        right.set(title=f"Law-P, fitted left of D = {LARGEST[0]}", xlabel="samples D", ylabel="perplexity")
        forms = [
            Line2D([], [], color=LIGHT["muted"], linestyle=dashes, label=label)
            for dashes, label in zip(DASHES, ("power", "with over-fitting term"), strict=True)
        ]
        left.legend(handles=rank_handles("LLM rank", colours))
        right.legend(handles=forms)
        return to_svg(figure, "paper")


if __name__ == "__main__":
    main()
