"""Commands as tuples of phases, and the document that each prints.

Every command is safe to call again: see `job.phase`.
"""

from collections.abc import Sequence

from mars_jax.config.load import Config
from mars_jax.data.preview import preview
from mars_jax.evals.run import EVALUATE
from mars_jax.evals.served import verify_answers
from mars_jax.job.checks import check_data, check_model, check_probed_pictures
from mars_jax.job.data_phase import DATA
from mars_jax.job.directory import RunDirectory
from mars_jax.job.export import EXPORT, MERGE, verify_export
from mars_jax.job.job import make_job
from mars_jax.job.phase import Phase, run_phase
from mars_jax.report.phase import REPORT
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.progress import Reporter
from mars_jax.search.phases import COMPARE, FINETUNE, FIT, PLAN, PROBE, SELECT, check_strategy, has_probes

SEARCH = (DATA, PLAN, PROBE, FIT, SELECT)
PIPELINES: dict[str, tuple[Phase, ...]] = {
    "run": (*SEARCH, FINETUNE, EVALUATE, EXPORT, MERGE, REPORT),
    "plan": (DATA, PLAN),
    "probe": (DATA, PLAN, PROBE),
    "fit": (FIT,),
    "select": (SELECT,),
    "finetune": (FINETUNE,),
    "evaluate": (EVALUATE,),
    "compare": (*SEARCH, COMPARE),
    "report": (REPORT,),
}
"""Command -> its phases in order. The last one runs in any case; the others where the config has them."""


def run_pipeline(name: str, config: Config, reporter: Reporter) -> Document:
    """Runs a command of `PIPELINES`.

    Returns:
        The document of its last phase; for `run`, what the run came to.
    """
    documents = run_phases(PIPELINES[name], config, reporter)
    return _outcome(documents) if name == "run" else documents[PIPELINES[name][-1].name]


def run_phases(phases: Sequence[Phase], config: Config, reporter: Reporter) -> dict[str, Document]:
    """Runs phases in the run directory of a config, but for those that the config does without.

    Returns:
        Phase -> the document that describes its result.
    """
    check_strategy(config)
    with RunDirectory.open(config) as directory:
        job = make_job(config, reporter, directory)
        return {phase.name: run_phase(phase, job) for phase in phases if phase.applies(config) or phase is phases[-1]}


def _outcome(documents: dict[str, Document]) -> Document:
    conditions, kept = documents["evaluate"]["conditions"], ("loss", "perplexity", "accuracy")
    return {
        "pick": documents["select"]["pick"],
        "why": documents["select"]["explanation"],
        "test": {name: {key: value[key] for key in kept} for name, value in conditions.items()},
        **(documents["export"] if "export" in documents else documents["merge"]),
        "report": documents["report"]["report"],
    }


def check(config: Config, reporter: Reporter, *, show: int = 3) -> Document:
    """Checks config, data and targets before any step, with some samples as the model sees them; writes nothing."""
    check_strategy(config)
    job = make_job(config, reporter)
    check_model(config, job.base)
    summary = job.data.summary()
    check_data(config, job.base, job.data)
    if has_probes(config):
        check_probed_pictures(config, job.base.targets, job.data.search.train)
    targets = [
        {"module": t.module, "path": path, "layers": t.num_layers or 1, "in": t.d_in, "out": t.d_out}
        for path, t in job.base.targets.items()
    ]
    samples = preview(job.data.search.train[:show], job.data.preprocessor, job.data.shapes)
    return {"data": summary, "targets": targets, "samples": samples}


def export(config: Config, reporter: Reporter, *, verify: bool = False, merged: bool = False) -> Document:
    """Writes the PEFT adapter, on demand the merged checkpoint, and on demand checks both in PyTorch."""
    merged = merged or MERGE.applies(config)
    with RunDirectory.open(config) as directory:
        job = make_job(config, reporter, directory)
        document: Document = {}
        if EXPORT.applies(config):
            document |= run_phase(EXPORT, job)
        if merged:
            document |= run_phase(MERGE, job)
        if verify:
            document["verified"] = verify_export(job, merged=merged)
            document["answers"] = verify_answers(job, merged=merged)
        return document
