"""A made-up finished run with planted laws, in the layout of a run directory, for the tests of the report."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mars_jax.laws.fit import Laws
from mars_jax.laws.law_c import ConvergenceLaw
from mars_jax.laws.law_p import Overfit, PerformanceLaw, parameter_names
from mars_jax.laws.resamples import percentile_intervals
from mars_jax.runtime.jsonfiles import append_jsonl, write_json, write_text

# Planted laws of the made-up run; the over-fitting form of Law-P puts the best pair inside the grid.
LAW_C = {
    "vision": {"k": 6.0, "gamma": -0.35, "delta": 0.62, "E": 0.0},
    "llm": {"k": 7.0, "gamma": -0.20, "delta": 0.50, "E": 0.0},
}
LAW_P = {"A": 6.0, "alpha": {"vision": 0.12, "llm": 0.2}, "beta": 0.31, "E": 0.15}
OVERFIT = Overfit(C=4e-4, kappa={"vision": 0.7, "llm": 0.8}, eta=0.0)
GRID = (4, 8, 16, 32, 64)
SIZES = (128, 256, 512, 1024)
TARGET = 4096
TAU = math.log(1.25)
LOOKS = range(0, 276, 25)


def steps_of(module: str, rank: float, num_samples: float) -> float:
    law = LAW_C[module]
    return law["k"] * rank ** law["gamma"] * num_samples ** law["delta"]


def loss_of(vision: float, llm: float, num_samples: float) -> float:
    power = vision ** LAW_P["alpha"]["vision"] * llm ** LAW_P["alpha"]["llm"] * num_samples ** LAW_P["beta"]
    overfit = OVERFIT.C * vision ** OVERFIT.kappa["vision"] * llm ** OVERFIT.kappa["llm"]
    return LAW_P["A"] / power + LAW_P["E"] + overfit


def make_lanes(rng: np.random.Generator) -> list[dict[str, Any]]:
    designs = [({"vision": r, "llm": 0}, d) for r, d in product((4, 16, 64), SIZES)]
    designs += [({"vision": 0, "llm": r}, d) for r, d in product((4, 16, 64), SIZES)]
    designs += [
        ({"vision": v, "llm": m}, d) for (v, m), d in product([(4, 4), (4, 64), (64, 4), (64, 64), (16, 16)], SIZES)
    ]
    lanes = []
    for searched, size in designs:
        ranks = {**searched, "projector": 8 if all(searched.values()) else 0}
        adapted = [module for module, rank in ranks.items() if rank]
        times = {m: steps_of(m, searched[m], size) * math.exp(0.08 * rng.normal()) for m in LAW_C if searched[m]}
        censored = {m: t > LOOKS[-1] for m, t in times.items()}
        loss = loss_of(searched["vision"] or 1.5, searched["llm"] or 1.5, size) + 0.01 * rng.normal()
        lanes.append(
            {
                "lane": "-".join([*(f"{m}{r}" for m, r in ranks.items()), f"D{size}", "s0"]),
                "ranks": ranks,
                "num_samples": size,
                "seed": 0,
                "learning_rate": dict.fromkeys(adapted, 1e-3),
                "adapted": adapted,
                "steps": LOOKS[-1],
                "convergence_steps": {m: min(t, LOOKS[-1]) for m, t in times.items()},
                "censored": censored,
                "best_loss": loss,
                "best_step": LOOKS[-1],
                "update_norm": {m: 0.4 + 0.1 * rng.random() for m in adapted},
                "status": "horizon" if any(censored.values()) else "converged",
                "reason": None,
            }
        )
    lanes[-2] |= {"status": "diverged", "reason": "validation loss not finite at step 225", "best_loss": None}
    return lanes


def make_candidates() -> list[dict[str, Any]]:
    candidates = []
    for vision, llm in product(GRID, GRID):
        steps = {"vision": steps_of("vision", vision, TARGET), "llm": steps_of("llm", llm, TARGET)}
        imbalance = abs(math.log(steps["vision"] / steps["llm"]))
        loss = loss_of(vision, llm, TARGET)
        kept = imbalance <= TAU
        candidates.append(
            {
                "ranks": {"vision": vision, "llm": llm, "projector": 8},
                "convergence_steps": steps,
                "imbalance": imbalance,
                "kept": kept,
                "reason": None if kept else f"{max(steps, key=steps.get)} lags by a factor {math.exp(imbalance):.2f}",
                "predicted_loss": loss,
                "predicted_ci": [loss - 0.02, loss + 0.03],
                "parameters": 1000 * vision + 3000 * llm + 4000,
                "p_best": 0.0,
            }
        )
    best = min((c for c in candidates if c["kept"]), key=lambda c: c["predicted_loss"])
    best["p_best"] = 0.86
    return candidates


def make_run(run: Path, dropped_id: str = "easy-000017") -> Path:
    """A finished run with planted laws."""
    rng = np.random.default_rng(0)
    lanes = make_lanes(rng)
    for lane in lanes:
        append_jsonl(run / "probes/lanes.jsonl", lane)
        final = lane["best_loss"] or 1.0
        for step in LOOKS:
            diverging = lane["status"] == "diverged" and step >= 100
            if lane["status"] == "diverged" and step > 200:
                break
            slowest = max(lane["convergence_steps"].values())
            loss = final + (3.6 - final) * 0.1 ** (step / slowest)
            loss = loss * (1.05 ** (step - 100)) if diverging else loss + 0.01 * rng.normal()
            look = {"lane": lane["lane"], "step": step, "train_loss": loss - 0.05, "validation_loss": loss}
            ended = {"alive": True, "reason": None, "drift": {}, "update_norm": lane["update_norm"]}
            append_jsonl(run / "probes/curves.jsonl", look | ended)
    candidates = make_candidates()
    pick = next(c for c in candidates if c["p_best"])
    write_json(run / "laws.json", make_laws(rng))
    write_json(
        run / "selection.json",
        {
            "target_num_samples": TARGET,
            "pick": pick["ranks"],
            "p_best": pick["p_best"],
            "fallback": None,
            "method": "laws",
            "tau": TAU,
            "candidates": candidates,
        },
    )
    for step in range(0, 1201, 10):
        rate = 1e-3 * (1 - step / 1200)
        append_jsonl(
            run / "finetune/metrics.jsonl",
            {"step": step, "train_loss": 0.4 + 3 * math.exp(-step / 150) + 0.04 * rng.normal(), "learning_rate": rate},
        )
        if step % 100 == 0:
            loss = 0.45 + 3 * math.exp(-step / 160) + 1e-4 * max(0, step - 900)
            append_jsonl(run / "finetune/metrics.jsonl", {"step": step, "validation_loss": loss, "learning_rate": rate})
    write_json(
        run / "finetune/summary.json",
        {
            "steps": 1200,
            "best_step": 1000,
            "best_validation_loss": 0.4658,
            "ranks": pick["ranks"],
            "num_samples": TARGET,
            "seconds": 812.5,
        },
    )
    conditions = {
        "base": (3.41, 0.052, 0.033),
        "finetuned": (0.462, 0.882, 0.03),
        "finetuned_blind": (1.93, 0.413, 0.045),
        "finetuned_shuffled": (2.61, 0.391, 0.045),
        "base_blind": (3.62, 0.047, 0.02),
        "base_shuffled": (3.55, 0.05, 0.02),
    }
    write_json(
        run / "evaluation.json",
        {
            "split": "test",
            "num_samples": 512,
            "scoring": "string_loglik",
            "num_candidates": 13,
            "conditions": {
                name: {
                    "loss": loss,
                    "perplexity": math.exp(loss),
                    "accuracy": accuracy,
                    "accuracy_ci": [accuracy - half, accuracy + half],
                    "supervised_tokens": 1536,
                }
                for name, (loss, accuracy, half) in conditions.items()
            },
            "generated": [
                {"condition": name, "rule": "exact", "accuracy": 0.871, "accuracy_ci": [0.84, 0.9], "unread": 3}
                for name in ("base", "finetuned")
            ],
            "by_tag": [
                {
                    "tag": "subject",
                    "value": subject,
                    "rule": "string_loglik",
                    "num_samples": 256,
                    **{name: 0.5 + place / 100 for place, name in enumerate(conditions)},
                    **{f"{name}_ci": [0.4, 0.6] for name in ("base", "finetuned")},
                }
                for subject in ("shape & form", "colour")
            ],
            "macro_means": [{"category": "average", "rule": "exact", **dict.fromkeys(conditions, 0.77)}],
            "paired": [
                {
                    "rule": "exact",
                    "first": "base",
                    "second": "finetuned",
                    "only_first": 12,
                    "only_second": 345,
                    "p_value": 0.0001,
                }
            ],
        },
    )
    write_json(
        run / "data.json",
        {
            "train": TARGET,
            "validation": 512,
            "test": 512,
            "dropped": [
                {"id": dropped_id, "reason": "3 images but 1 <image>"},
                {"id": "easy-000912", "reason": "no answer"},
            ],
            "shapes": {"tokens": 64, "patches": 36},
            "tokens_per_sample": 55.5,
        },
    )
    steps = sum(lane["steps"] for lane in lanes)
    write_json(
        run / "plan.json",
        {"lanes": len(lanes), "lane_steps": steps, "samples": 16 * steps, "full_grid_steps": 25 * 1200},
    )
    seconds = {
        "plan": 3.2,
        "probe": 4210.0,
        "fit": 9.1,
        "select": 0.4,
        "finetune": 812.5,
        "evaluate": 71.0,
        "export": 6.6,
    }
    write_json(
        run / "state.json",
        {
            "phases": {name: {"status": "done", "seconds": value} for name, value in seconds.items()},
            "versions": {"mars_jax": "0.1.0", "jax": "0.10.1", "python": "3.11.9"},
            "peak_memory_bytes": 3_412_000_000,
        },
    )
    write_json(
        run / "adapter/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "bases/tiny-onevision"}
    )
    write_text(
        run / "config.resolved.yaml",
        "run_dir: runs/demo\nmodel:\n  checkpoint: bases/tiny-onevision\nprobe:\n  batch_size: 16\n  steps: 275\n"
        "finetune:\n  batch_size: 32\n  steps: 1200\n",
    )
    return run


def make_laws(rng: np.random.Generator) -> dict[str, Any]:
    convergence = {}
    for module, law in LAW_C.items():
        noise = rng.normal(size=(100, 2))
        moved = [
            law["k"] * np.exp(0.1 * noise[:, 0]),
            law["gamma"] + 0.01 * noise[:, 1],
            law["delta"] - 0.017 * noise[:, 0],
        ]
        draws = np.stack([*moved, np.zeros(100)], axis=1)
        ci = percentile_intervals(tuple(law), draws)
        convergence[module] = ConvergenceLaw(**law, ci=ci, points=32, rmse_log=0.08, censored=1, draws=draws)
    names = parameter_names("power_overfit", tuple(LAW_P["alpha"]))
    point = np.array([LAW_P["A"], LAW_P["E"], LAW_P["beta"], *LAW_P["alpha"].values()])
    point = np.append(point, [OVERFIT.C, OVERFIT.eta, *OVERFIT.kappa.values()])
    draws = point * np.exp(0.01 * rng.normal(size=(100, len(names))))
    performance = PerformanceLaw(
        form="power_overfit",
        **LAW_P,
        overfit=OVERFIT,
        ci=percentile_intervals(names, draws),
        held_out_error=0.012,
        order_tau=0.91,
        draws=draws,
    )
    return Laws(convergence, {}, performance, multiplicative=performance, diverged=1).to_json()
