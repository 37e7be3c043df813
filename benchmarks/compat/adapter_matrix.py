"""Share of adapters that pass between us and PEFT unchanged, over versions, model families and settings.

In fresh environments of several versions of transformers and PEFT, on a tiny random checkpoint of each model family,
PEFT loads our exports, and we read adapters that PEFT made. An adapter passes if logits agree on both sides; ours only
if PEFT also holds exactly the tensors of the file and warns of nothing.

    python -m benchmarks.compat.adapter_matrix [--work FOLDER] [--short] [--out FOLDER]

`--short` uses the installed versions. Environments are made by `venv` and pip, in the folder of `--work` or in one that
is removed; those that are there already are used again.

Definitions. Five checkpoints in the hub's layout (adapter_bases.py): LLaVA with CLIP, SigLIP and DINOv2,
LLaVA-OneVision, Qwen2.5-VL. Adapters of modules x ranks and alphas with drawn weights, both ways:
  ours    our export is loaded with `PeftModel.from_pretrained`; the names of its tensors must mean the same linears;
  theirs  an adapter that PEFT made and saved is read by `read_adapter`.
Logits of two samples with a picture each are compared where there is no padding, to 1e-4 absolute, and must differ from
the base's by a hundred times that; the base's own logits must be ours, and none of its tensors unused. Where a version
places pictures otherwise, adapters are compared with our positions given to it, and the result lists it.

figure = combinations that pass / combinations.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.compat.adapter_bases import BASES, MOST, Base, make_base, targets_of
from benchmarks.lib.child import Document, argument_parser, publish
from mars_jax.adapters.lora import AlphaRule, Lora
from mars_jax.errors import MarsError
from mars_jax.hub.adapter import ADAPTER_WEIGHTS_FILE, PEFT_PREFIX, read_adapter, write_adapter
from mars_jax.models.families.registry import checkpoint_table
from mars_jax.runtime.trees import Tree, unflatten

TOLERANCE = 1e-4
MOVED = 100 * TOLERANCE
TORCH = "2.13.0"
PAIRS = (("4.57.6", "0.18.0"), ("5.3.0", "0.18.1"), ("5.23.0", "0.21.2"))  # transformers, PEFT
MODULES = (("vision",), ("llm",), ("vision", "projector", "llm"))
EQUAL, DIFFERENT = {"vision": 4, "projector": 4, "llm": 4}, {"vision": 2, "projector": 3, "llm": MOST}
SETTINGS = {
    "equal ranks, alpha = 2 r": (EQUAL, AlphaRule("proportional", 2.0)),
    "different ranks, alpha = 2 r": (DIFFERENT, AlphaRule("proportional", 2.0)),
    "different ranks, alpha = 6": (DIFFERENT, AlphaRule("fixed", 6.0)),
    "different ranks, rsLoRA, alpha = 4": (DIFFERENT, AlphaRule("rslora", 4.0)),
}
DEVIATION, SEED = 0.15, 1
SHOWN = 200  # characters of a warning
# As people write them: PEFT's word for every linear, or an expression.
_LINEARS = r"(q_proj|k_proj|v_proj|o_proj|out_proj|query|key|value|dense|fc1|fc2|qkv|proj|gate_proj|up_proj|down_proj)"
TARGETS = {
    ("vision",): rf".*(vision_tower\..*encoder|visual\.blocks)\..*{_LINEARS}",
    ("llm",): rf".*language_model\..*{_LINEARS}",
    ("vision", "projector", "llm"): "all-linear",
}


class Case(NamedTuple):
    """An adapter: what it adapts, its ranks, its alphas."""

    modules: tuple[str, ...]
    setting: str

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank."""
        return {module: SETTINGS[self.setting][0][module] for module in self.modules}

    @property
    def alpha(self) -> AlphaRule:
        """The rule."""
        return SETTINGS[self.setting][1]


CASES = tuple(Case(*case) for case in product(MODULES, SETTINGS))


def main() -> None:
    """Writes results/adapter_matrix.json; about fifteen minutes, of which a third are pip's."""
    parser = argument_parser(__doc__)
    parser.add_argument("--work", type=Path, help="folder of the environments, kept")
    options = parser.parse_args()
    rows: list[Document] = []
    bases: list[Document] = []
    environments: list[Document] = []
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(TemporaryDirectory()))
        pairs = [("installed", "installed")] if options.short else PAIRS
        pythons = {pair: sys.executable if options.short else environment(work, *pair) for pair in pairs}
        for name in BASES:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            base = make_base(folder, name)
            exports = export(base, folder)
            for pair, python in pythons.items():
                print(f"{name}: transformers {pair[0]}, PEFT {pair[1]}", file=sys.stderr)
                place = folder / "-".join(pair)
                answer = ask(python, place, base, exports)
                if answer["versions"] not in environments:
                    environments.append(answer["versions"])
                whose = {"base": name, "pair": pair}
                bases.append(whose | judged_base(answer["base"], place, base))
                rows += [whose | row for row in judged(answer, bases[-1], place, base, exports)]
    passed = sum(row["reason"] is None for row in rows)
    publish(
        options,
        "adapter_matrix",
        passed / len(rows),
        "combinations of base, versions, modules, ranks and direction that pass / all",
        "at least 1",
        {
            "tolerance": TOLERANCE,
            "moved_at_least": MOVED,
            "environments": environments,
            "bases": bases,
            "combinations": rows,
            "tables": tables(rows, bases),
        },
    )


def environment(work: Path, transformers: str, peft: str) -> str:
    """The interpreter of a virtual environment with these versions.

    Raises:
        subprocess.CalledProcessError: pip can't install them; its messages are on stderr.
    """
    folder = work / f"transformers-{transformers}-peft-{peft}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        packages = [f"torch=={TORCH}", f"transformers=={transformers}", f"peft=={peft}"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, stdout=sys.stderr)
        (folder / "installed").write_text("\n".join(packages))
    return str(python)


def export(base: Base, folder: Path) -> dict[Case, tuple[Path, Tree]]:
    """Our adapters with drawn weights, on disk and as trees."""
    rng, exports = np.random.default_rng(SEED), {}
    for number, case in enumerate(CASES):
        flat, method = {}, Lora(case.alpha)
        for path, target in targets_of(base.config).items():
            rank = case.ranks.get(target.module, 0)
            for name, leaf in method.leaves(target, rank).items():
                if leaf.trained:
                    flat[f"{path}/{name}"] = rng.normal(0, DEVIATION, leaf.shape).astype(np.float32)
                else:
                    flat[f"{path}/{name}"] = np.full(leaf.shape, method.fixed(rank)[name], np.float32)
        directory, adapters = folder / f"export{number}", unflatten(flat)
        write_adapter(directory, adapters, case.ranks, base.config, base_name=str(base.directory), provenance={})
        exports[case] = directory, adapters
    return exports


def ask(python: str, place: Path, base: Base, exports: dict[Case, tuple[Path, Tree]]) -> Document:
    """The answer of a fresh process of that environment on the base, our exports and adapters of its own."""
    place.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in base.inputs.items()}, place / "batch.safetensors")
    job = {
        "base": str(base.directory),
        "seed": SEED,
        "deviation": DEVIATION,
        "load": {f"ours{number}": str(directory) for number, (directory, _) in enumerate(exports.values())},
        "make": {
            f"theirs{number}": {"settings": lora_settings(case, base), "directory": str(place / f"made{number}")}
            for number, case in enumerate(CASES)
        },
    }
    (place / "job.json").write_text(json.dumps(job))
    # No path of ours: the environment stands for a user's.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("adapter_process.py")
    variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([python, script, place], env=variables, check=True, stdout=sys.stderr)
    answer: Document = json.loads((place / "answer.json").read_text())
    return answer


def lora_settings(case: Case, base: Base) -> Document:
    """The case as arguments of PEFT's `LoraConfig`."""
    alphas = {
        m: case.alpha.value * (rank if case.alpha.rule == "proportional" else 1) for m, rank in case.ranks.items()
    }
    default, keys = case.modules[-1], checkpoint_table(base.config).modules
    others = [module for module in case.modules if module != default]
    return {
        "r": case.ranks[default],
        "lora_alpha": alphas[default],
        "rank_pattern": {keys[module].pattern_key: case.ranks[module] for module in others},
        "alpha_pattern": {keys[module].pattern_key: alphas[module] for module in others},
        "use_rslora": case.alpha.rule == "rslora",
        "target_modules": TARGETS[case.modules],
    }


def judged_base(found: Document, place: Path, base: Base) -> Document:
    """How far the base's logits are from ours, and with whose positions; `reason` is set if they can't be compared."""
    if found.get("error") or found["astray"]:
        return {"reason": f"base: {found.get('error') or found['astray']}"}
    ours = base.logits({})
    apart = {kind: difference(base, theirs, ours) for kind, theirs in load_file(place / "base.logits").items()}
    # Its own positions, if they will do.
    positions = next((kind for kind in ("own", "given") if apart.get(kind, np.inf) <= TOLERANCE), None)
    reason = None if positions else f"base: its logits are {min(apart.values()):.3g} from ours"
    return {"positions": positions, "differences": apart, "reason": reason}


def judged(
    answer: Document, of_base: Document, place: Path, base: Base, exports: dict[Case, tuple[Path, Tree]]
) -> list[Document]:
    """A row for each adapter and direction; `reason` is why it does not pass, None if it does."""
    ours_alone = base.logits({})
    rows = []
    for direction, (number, case) in product(("ours", "theirs"), enumerate(CASES)):
        row: Document = {"direction": direction, "modules": " ".join(case.modules), "setting": case.setting}
        name = f"{direction}{number}"
        found = {} if of_base["reason"] else answer["adapters"][name]
        reason = of_base["reason"] or found.get("error")
        if not reason:
            directory = exports[case][0] if direction == "ours" else place / f"made{number}"
            theirs = load_file(place / f"{name}.logits")[of_base["positions"]]
            try:
                adapters = exports[case][1] if direction == "ours" else read_adapter(directory, base.config)[0]
            except MarsError as error:
                reason = f"not read: {error}"
            else:
                held = place / f"{name}.tensors"
                row["tensors"] = len(load_file(directory / ADAPTER_WEIGHTS_FILE))
                row["logits_difference"] = difference(base, theirs, base.logits(adapters))
                row["moved"] = difference(base, theirs, ours_alone)
                reason = (
                    (fault_of_tensors(directory / ADAPTER_WEIGHTS_FILE, held, base) if direction == "ours" else None)
                    or "; ".join(f"PEFT warns: {text[:SHOWN]}" for text in found["warnings"])
                    or fault_of_logits(row["logits_difference"], row["moved"])
                )
        rows.append(row | {"reason": reason})
    return rows


def fault_of_tensors(file: Path, held: Path, base: Base) -> str | None:
    """What of the file PEFT doesn't hold, and what else it holds."""
    table = checkpoint_table(base.config)
    stored = {table.hub_key(name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in load_file(file).items()}
    loaded = {
        table.hub_key(name.removeprefix(PEFT_PREFIX).replace(".default.", ".")): tensor
        for name, tensor in load_file(held).items()
    }
    unused, added = sorted(set(stored) - set(loaded)), sorted(set(loaded) - set(stored))
    other = [name for name in stored if name in loaded and not np.array_equal(stored[name], loaded[name])]
    if not (unused or added or other):
        return None
    counts = {"unused": unused, "not in the file": added, "with other values": other}
    found = ", ".join(f"{len(names)} {what} ({names[0]}, ...)" for what, names in counts.items() if names)
    return f"of {len(stored)} tensors: {found}"


def fault_of_logits(apart: float, moved: float) -> str | None:
    """Written so that NaN is a fault too."""
    if not apart <= TOLERANCE:
        return f"logits {apart:.3g} apart"
    return None if moved >= MOVED else f"logits moved by {moved:.3g} only"


def difference(base: Base, left: np.ndarray, right: np.ndarray) -> float:
    """The largest, over tokens that are no padding."""
    mask = base.inputs["attention_mask"].astype(bool)
    return float(np.abs(left[mask] - right[mask]).max())


def tables(rows: list[Document], bases: list[Document]) -> dict[str, list[Document]]:
    """How many pass, by base and direction and by modules and setting, for each pair; and everything that doesn't."""

    def counted(keys: tuple[str, ...]) -> list[Document]:
        groups: dict[tuple[str, ...], dict[str, list[bool]]] = {}
        for row in rows:
            group = groups.setdefault(tuple(row[key] for key in keys), {})
            group.setdefault(title(row), []).append(row["reason"] is None)
        return [
            dict(zip(keys, group, strict=True))
            | {pair: f"{sum(found)} of {len(found)}" for pair, found in pairs.items()}
            for group, pairs in groups.items()
        ]

    measured = [row for row in rows if "moved" in row]
    extremes = [
        {
            "versions": pair,
            "largest difference from our logits": max(
                row["logits_difference"] for row in measured if title(row) == pair
            ),
            "least that an adapter moves logits": min(row["moved"] for row in measured if title(row) == pair),
        }
        for pair in dict.fromkeys(map(title, measured))
    ]
    faults = [
        {"base": row["base"], "versions": title(row)}
        | {key: row[key] for key in ("direction", "modules", "setting", "reason")}
        for row in rows
        if row["reason"]
    ]
    otherwise = [
        {
            "base": base["base"],
            "versions": title(base),
            "difference from our logits": base["differences"]["own"],
            "the same with our positions": base["differences"]["given"],
        }
        for base in bases
        if base.get("positions") == "given"
    ]
    return {
        "Passed, by base and direction": counted(("base", "direction")),
        "Passed, by what is adapted": counted(("modules", "setting")),
        "Logits": extremes,
        **({"Bases whose pictures a version places otherwise, without any adapter": otherwise} if otherwise else {}),
        **({"What does not pass": faults} if faults else {}),
    }


def title(row: Document) -> str:
    """The versions of a row."""
    return f"transformers {row['pair'][0]}, PEFT {row['pair'][1]}"


if __name__ == "__main__":
    main()
