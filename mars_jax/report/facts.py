"""The document of report.json: verdict, warnings, costs and tables of a run."""

import math

from mars_jax.adapters.registry import METHODS
from mars_jax.report.collect import Record, RunRecord
from mars_jax.report.laws_data import joint_lanes, searched_modules
from mars_jax.report.words import count, listing, number, percent, ranks_text
from mars_jax.report.worth import worth_of_modules, worth_sentence
from mars_jax.runtime.jsonfiles import Document

SCHEMA = 1
CONDITIONS = {  # condition of evaluation.json -> its name on the page, in the order of the table
    "base": "base model",
    "finetuned": "fine-tuned",
    "finetuned_blind": "fine-tuned, blank image",
    "finetuned_shuffled": "fine-tuned, another sample's image",
    "base_blind": "base model, blank image",
    "base_shuffled": "base model, another sample's image",
}
SURE = 0.8  # least P(best) at which the laws alone decide the pick
EXTRAPOLATION = 4.0  # largest ratio of target D to probed D without a warning
CLOSE = 0.02  # final losses of two runs of one pair differ by about this share (docs/evidence.md, noise)


def build_report(run: RunRecord) -> Document:
    """The document of report.json without its figures. A part whose files are absent is null or empty.

    Keys: `schema`, `run`, `sources`, `verdict`, `evaluation`, `selection`, `sweep`, `worth`, `laws` (without draws),
    `probes`, `finetune`, `data`, `costs`, `phases`, `versions`.
    """
    selection = dict(run.selection)
    selection["candidates"] = sorted(
        run.selection.get("candidates") or [],
        key=lambda c: (not c.get("kept"), c.get("predicted_loss") is None, c.get("predicted_loss"), str(c["ranks"])),
    )
    return {
        "schema": SCHEMA,
        "run": run.directory.resolve().name,
        "sources": {"read": list(run.read), "absent": list(run.absent)},
        "verdict": verdict(run),
        "evaluation": dict(run.evaluation) or None,
        "selection": selection if run.selection else None,
        "sweep": _sweep(run) or None,
        "worth": worth_of_modules(run) or None,
        "laws": {key: value for key, value in run.laws.items() if key != "draws"} or None,
        "probes": {"statuses": _statuses(run), "lanes": list(run.lanes)} if run.lanes else None,
        "finetune": dict(run.summary) or None,
        "data": dict(run.data) or None,
        "costs": costs(run),
        "phases": dict(run.state.get("phases") or {}),
        "versions": dict(run.state.get("versions") or {}),
    }


def verdict(run: RunRecord) -> Document:
    """The pick, the evidence for it, and warnings.

    Keys: `headline`, `sentences` and `warnings` (plain text); `pick`, `p_best`, `method`, `fallback` (selection.json).
    """
    pick = run.selection.get("pick")
    return {
        "headline": _headline(run),
        "sentences": [*_choice_sentences(run), *_outcome_sentences(run)],
        "warnings": [*_selection_warnings(run), *_probe_warnings(run), *_outcome_warnings(run)],
        "pick": pick,
        "p_best": run.selection.get("p_best"),
        "method": run.selection.get("method"),
        "fallback": run.selection.get("fallback"),
    }


def _headline(run: RunRecord) -> str:
    pick = run.selection.get("pick")
    if not pick:
        return "No ranks are picked yet: " + (
            "the laws are fitted, the selection has not run."
            if run.laws
            else f"{len(run.lanes)} probe lanes have finished, the laws are not fitted."
            if run.lanes
            else "no probe lane has finished."
        )
    method = run.config.get("adapter", {}).get("method")
    if method in METHODS.names and not METHODS[method].has_ranks:
        return f"Trained by the adapter method {method}, which has no ranks: {listing(list(pick))}."
    searched = searched_modules(run) or list(pick)
    fixed = {module: rank for module, rank in pick.items() if module not in searched}
    factors = run.selection.get("factors") or {}
    rates = {module: f" at {factor:.3g} times its learning rate" for module, factor in factors.items()}
    chosen = listing([_chosen(module, pick[module]) + rates.get(module, "") for module in searched])
    return f"Use {chosen}{f' (given: {ranks_text(fixed)})' if fixed else ''}."


def _chosen(module: str, rank: int) -> str:
    return f"rank\u00a0{rank} for {module}" if rank else f"no adapter for {module}, which stays frozen"


def _choice_sentences(run: RunRecord) -> list[str]:
    selection, sentences = run.selection, []
    if not selection.get("pick"):
        return []
    candidates = selection.get("candidates") or []
    balanced = sum(bool(candidate.get("kept")) for candidate in candidates)
    p_best, target = selection.get("p_best"), selection.get("target_num_samples")
    swept = selection.get("method") == "local_sweep"
    if swept:
        probed = sum(candidate.get("probed_loss") is not None for candidate in candidates)
        sentences.append(
            f"{probed} of the {len(candidates)} rank vectors were probed; the best {len(_sweep_runs(run))} of these "
            "had final runs, and the worse half of these ended at each rung. The measured losses decided, not the laws."
        )
    if p_best is not None and balanced and not swept:
        sentences.append(
            f"In {percent(p_best, 0)} of the bootstrap refits this choice has the lowest predicted validation loss "
            f"of {_field(selection, balanced)} at {count(target)} training samples. Whether the law "
            "holds there is not part of that number."
        )
    picked = picked_candidate(run)
    steps = {m: t for m, t in (picked.get("convergence_steps") or {}).items() if t is not None and math.isfinite(t)}
    if len(steps) > 1 and picked.get("imbalance") is not None:
        times = listing([f"{module} after about {count(t)}" for module, t in steps.items()])
        together = "should converge together" if picked.get("kept") else "should not converge together"
        sentences.append(f"With these ranks the modules {together}: {times} steps.")
    if selection.get("explanation"):
        sentences.append(str(selection["explanation"]))
    return [*sentences, *map(worth_sentence, worth_of_modules(run))]


def _field(selection: Record, balanced: int) -> str:
    """The candidates that the pick was compared with; `tau` is null where no balance is known."""
    total = len(selection["candidates"])
    if selection.get("tau", 0.0) is None:
        return f"all {total} candidates"
    return f"the {balanced} balanced candidates (of {total})"


def _outcome_sentences(run: RunRecord) -> list[str]:
    base, tuned, blind = (_condition(run, name) for name in ("base", "finetuned", "finetuned_blind"))
    samples = count(run.evaluation.get("num_samples"))
    split = run.evaluation.get("split", "test")
    sentences = []
    if tuned.get("accuracy") is not None:
        blind_text = f" ({percent(blind['accuracy'])} with a blank image)" if blind.get("accuracy") is not None else ""
        base_text = f", the base model {percent(base['accuracy'])}" if base.get("accuracy") is not None else ""
        sentences.append(
            f"On {samples} {split} samples the fine-tuned model answers {percent(tuned['accuracy'])} correctly"
            f"{blind_text}{base_text}."
        )
    elif tuned.get("perplexity") is not None and base.get("perplexity") is not None:
        sentences.append(
            f"On {samples} {split} samples the perplexity is {number(tuned['perplexity'])}, "
            f"the base model's {number(base['perplexity'])}."
        )
    return sentences


def _sweep_runs(run: RunRecord) -> list[Record]:
    return list(run.sweep.get("runs") or [])


def _sweep(run: RunRecord) -> list[Document]:
    """The started final runs.

    Keys: `ranks`; `trained`, those of modules that aren't frozen; `factors` on the learning rates of modules whose
    rates differ between these runs, null where frozen; `is_pick`; `steps`; `loss`, the lowest, null if it diverged.
    """
    rated = dict.fromkeys(module for final in _sweep_runs(run) for module in final.get("factors") or {})
    return [
        {
            "ranks": dict(final["ranks"]),
            "trained": {module: rank for module, rank in final["ranks"].items() if rank},
            "factors": {m: (final.get("factors") or {}).get(m, 1.0) if final["ranks"][m] else None for m in rated},
            "is_pick": is_pick(run, final),
            "steps": final["looks"][-1][0],
            "loss": None if None in (losses := [loss for _, loss in final["looks"]]) else min(losses),
        }
        for final in _sweep_runs(run)
    ]


def is_pick(run: RunRecord, final: Record) -> bool:
    """Whether a final run of the sweep is that of the pick."""
    trained = {module: rank for module, rank in final["ranks"].items() if rank}
    pick = {module: rank for module, rank in (run.selection.get("pick") or {}).items() if rank}
    how = [(one.get("factors") or {}, one.get("seed") or 0) for one in (final, run.selection)]
    return trained == pick and how[0] == how[1]


def _condition(run: RunRecord, name: str) -> Record:
    return (run.evaluation.get("conditions") or {}).get(name) or {}


def picked_candidate(run: RunRecord) -> Record:
    """The record of the pick among the candidates; empty where there is none."""
    pick = run.selection.get("pick")
    return next((c for c in run.selection.get("candidates") or [] if c["ranks"] == pick), {})


def _selection_warnings(run: RunRecord) -> list[str]:
    selection, warnings = run.selection, []
    pick = selection.get("pick") or {}
    if selection.get("fallback"):
        warnings.append(f"Fallback: {selection['fallback']}")
    p_best = selection.get("p_best")
    if p_best is not None and p_best < SURE and selection.get("method") != "local_sweep":
        warnings.append(
            f"The laws do not settle this choice (P(best) {percent(p_best, 0)}, {percent(SURE, 0)} is required): "
            "other balanced candidates may be as good. Final runs of several (`selection.sweep`) would decide."
        )
    picked = picked_candidate(run).get("predicted_loss") or math.nan
    others = [
        candidate
        for candidate in selection.get("candidates") or []
        if candidate["ranks"] != pick and candidate.get("predicted_loss") is not None
    ]
    close = [other for other in others if other.get("kept") and other["predicted_loss"] <= picked * (1 + CLOSE)]
    if close and selection.get("method") != "local_sweep":
        warnings.append(
            f"{count(len(close))} other {'candidate is' if len(close) == 1 else 'candidates are'} predicted within "
            f"{percent(CLOSE, 0)} of the pick's loss, and final runs of one pair have differed by as much between "
            "seeds: any of them may end better. `mars compare` trains them side by side."
        )
    for module in searched_modules(run):
        grid = sorted({candidate["ranks"][module] for candidate in selection["candidates"]})
        if pick.get(module) in (grid[0], grid[-1]):
            end, beyond = ("largest", "larger") if pick[module] == grid[-1] else ("smallest", "smaller")
            warnings.append(
                f"The picked {module} rank {pick[module]} is the {end} of its grid: {beyond} ranks were not considered."
            )
    better = [other for other in others if not other.get("kept") and other["predicted_loss"] < picked]
    if better and selection.get("method") != "local_sweep":
        lowest = min(better, key=lambda candidate: candidate["predicted_loss"])
        warnings.append(
            f"Law-P predicts a lower loss for {len(better)} of the candidates pruned as unbalanced, the lowest for "
            f"{ranks_text(lowest['ranks'])} ({number(lowest['predicted_loss'])} against {number(picked)})."
        )
    largest = max((lane["num_samples"] for lane in joint_lanes(run)), default=None)
    target = selection.get("target_num_samples")
    if largest and target and target > EXTRAPOLATION * largest:
        warnings.append(
            f"The prediction at {count(target)} samples reaches {number(target / largest, 2)} times beyond the largest "
            f"probe ({count(largest)} samples)."
        )
    for module, law in (run.laws.get("convergence") or {}).items():
        if law["gamma"] >= 0:
            warnings.append(
                f"A larger {module} rank does not converge sooner here (gamma {law['gamma']:+.2f}; below 0 is "
                f"expected): balance says little about {module}."
            )
    tau = (run.laws.get("performance") or {}).get("order_tau")
    if tau is not None and tau < 0.3:
        warnings.append(
            f"Law-P puts held-out ranks in a poor order (Kendall tau {tau:.2f}; 1 is perfect): "
            "trust the measured losses over the predicted ones."
        )
    return warnings


def _probe_warnings(run: RunRecord) -> list[str]:
    warnings = [f"Left out: {note}." for note in run.notes]
    diverged = [lane for lane in run.lanes if lane.get("status") == "diverged"]
    if diverged:
        names = listing([str(lane.get("lane")) for lane in diverged[:5]]) + (" and more" if len(diverged) > 5 else "")
        warnings.append(f"{len(diverged)} of {len(run.lanes)} probe lanes diverged and count for no law: {names}.")
    for module in sorted({module for lane in run.lanes for module in lane.get("censored") or {}}):
        flags = [bool(lane["censored"][module]) for lane in run.lanes if module in (lane.get("censored") or {})]
        if sum(flags) > len(flags) / 2:
            warnings.append(
                f"{module} had not converged at the end of {sum(flags)} of {len(flags)} lanes, so its Law-C rests "
                "mostly on lower limits. More probe steps would help."
            )
    dropped = run.data.get("dropped") or []
    if dropped:
        warnings.append(f"{count(len(dropped))} samples were dropped from the data; they are listed under Data.")
    for name, phase in (run.state.get("phases") or {}).items():
        if phase.get("status") in ("failed", "interrupted"):
            warnings.append(f"The phase {name} {'failed' if phase['status'] == 'failed' else 'was interrupted'}.")
    return warnings


def _outcome_warnings(run: RunRecord) -> list[str]:
    warnings = []
    base, tuned = _condition(run, "base"), _condition(run, "finetuned")
    if tuned.get("loss") is not None and base.get("loss") is not None and tuned["loss"] >= base["loss"]:
        warnings.append(
            f"Fine-tuning did not lower the test loss ({number(tuned['loss'])}, base model {number(base['loss'])})."
        )
    low = (tuned.get("accuracy_ci") or [None])[0]
    for name, what in (("finetuned_blind", "a blank image"), ("finetuned_shuffled", "another sample's image")):
        accuracy = _condition(run, name).get("accuracy")
        if low is not None and accuracy is not None and accuracy >= low:
            warnings.append(
                f"With {what} the fine-tuned model is about as accurate ({percent(accuracy)}) as with the right one "
                f"({percent(tuned['accuracy'])}): it may answer from the text alone."
            )
    best, steps = run.summary.get("best_step"), run.summary.get("steps")
    if best is not None and steps and best >= steps:
        warnings.append("The validation loss of the fine-tune was lowest at its last step: more steps may help.")
    return warnings


def _statuses(run: RunRecord) -> dict[str, int]:
    statuses = [str(lane.get("status")) for lane in run.lanes]
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def costs(run: RunRecord) -> Document:
    """Steps, samples, tokens and seconds of the run, and the same for a full grid of final runs.

    `search` is the probes, `sweep` the final runs besides the kept one. A number is null where a file that it needs is
    absent: samples need the batch sizes of `config.resolved.yaml`, tokens
    `tokens_per_sample` of `data.json`, the grid `full_grid_steps` of `plan.json`.
    """
    probe_batch = (run.config.get("probe") or {}).get("batch_size")
    final_batch = (run.config.get("finetune") or {}).get("batch_size")
    tokens = run.data.get("tokens_per_sample")

    def spent(steps: int | None, batch: int | None) -> dict[str, int | None]:
        samples = steps * batch if steps is not None and batch else None
        per_sample = tokens if isinstance(tokens, int | float) else None
        return {
            "steps": steps,
            "samples": samples,
            "tokens": round(samples * per_sample) if samples is not None and per_sample else None,
        }

    lanes = run.lanes
    if (run.config.get("probe") or {}).get("sampling") == "nested":
        # The records of smaller D are prefixes of the same lanes.
        largest = max((lane["num_samples"] for lane in lanes), default=0)
        lanes = tuple(lane for lane in lanes if lane["num_samples"] == largest)
    probes = spent(sum(lane.get("steps") or 0 for lane in lanes) if lanes else None, probe_batch)
    final = spent(run.summary.get("steps"), final_batch)
    started = sum(other["looks"][-1][0] for other in _sweep_runs(run))
    others = spent(max(0, started - (final["steps"] or 0)), final_batch)
    grid = spent(run.plan.get("full_grid_steps"), final_batch)
    share = None
    if probes["samples"] and others["samples"] is not None and grid["samples"]:
        share = (probes["samples"] + others["samples"]) / grid["samples"]
    seconds = {name: phase.get("seconds") for name, phase in (run.state.get("phases") or {}).items()}
    return {
        "search": probes,
        "sweep": others,
        "finetune": final,
        "full_grid": grid,
        "search_share_of_full_grid": share,
        "seconds": seconds,
        "peak_memory_bytes": run.state.get("peak_memory_bytes"),
    }
