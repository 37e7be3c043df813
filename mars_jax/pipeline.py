"""What each command does: the phases that it needs, in order.

Every function takes a config and a reporter and returns the JSON document that the command line prints. Each is safe to
call again: see `session`.
"""

from mars_jax.config.load import Config
from mars_jax.data.preview import shown
from mars_jax.job.checks import check_model, check_sizes
from mars_jax.job.directory import RunDirectory
from mars_jax.job.workspace import Workspace
from mars_jax.runtime.progress import Reporter
from mars_jax.session import Document, Session


def run(config: Config, reporter: Reporter) -> Document:
    """Every phase, from plan to report."""
    with RunDirectory.open(config) as directory:
        session = Session(config, reporter, directory)
        selection = session.search()
        session.finetune()
        evaluation = session.evaluate()
        session.export(verify=False, merged=config.export.merged)
        page = session.report()
    conditions = evaluation["conditions"]
    kept = ("loss", "perplexity", "accuracy")
    return {
        "pick": selection["pick"],
        "why": selection["explanation"],
        "test": {name: {key: value[key] for key in kept} for name, value in conditions.items()},
        "adapter": directory.adapter,
        "report": page["report"],
    }


def check(config: Config, reporter: Reporter, *, show: int = 3) -> Document:
    """Config, data and targets, before any step; writes nothing."""
    workspace = Workspace(config, reporter)
    check_model(workspace)
    summary = workspace.data_summary()
    check_sizes(workspace)
    rows = [
        {"module": t.module, "path": path, "layers": t.num_layers or 1, "in": t.d_in, "out": t.d_out}
        for path, t in workspace.targets.items()
    ]
    return {
        "data": summary,
        "targets": rows,
        "samples": shown(workspace.search.train[:show], workspace.preprocessor, workspace.shapes),
    }


def plan(config: Config, reporter: Reporter) -> Document:
    """The lanes, what they cost, and whether they fit this machine."""
    with RunDirectory.open(config) as directory:
        session = Session(config, reporter, directory)
        session.data()
        return session.plan()


def probe(config: Config, reporter: Reporter) -> Document:
    """Runs the lanes."""
    with RunDirectory.open(config) as directory:
        session = Session(config, reporter, directory)
        session.data()
        session.plan()
        return session.probe()


def fit(config: Config, reporter: Reporter) -> Document:
    """Fits both laws to the finished lanes; needs `probes/lanes.jsonl` alone."""
    with RunDirectory.open(config) as directory:
        return Session(config, reporter, directory).fit()


def select(config: Config, reporter: Reporter) -> Document:
    """Picks the ranks."""
    with RunDirectory.open(config) as directory:
        return Session(config, reporter, directory).select()


def finetune(config: Config, reporter: Reporter) -> Document:
    """The final run."""
    with RunDirectory.open(config) as directory:
        return Session(config, reporter, directory).finetune()


def evaluate(config: Config, reporter: Reporter) -> Document:
    """Measures base and result on the test split."""
    with RunDirectory.open(config) as directory:
        return Session(config, reporter, directory).evaluate()


def export(config: Config, reporter: Reporter, *, verify: bool = False, merged: bool = False) -> Document:
    """Writes the PEFT adapter, and on demand the merged checkpoint; `verify` loads them in PyTorch."""
    with RunDirectory.open(config) as directory:
        session = Session(config, reporter, directory)
        return session.export(verify=verify, merged=merged or config.export.merged)


def compare(config: Config, reporter: Reporter) -> Document:
    """The pick beside its alternatives, each trained to the end; searches first where that isn't done."""
    with RunDirectory.open(config) as directory:
        session = Session(config, reporter, directory)
        session.search()
        return session.compare()


def report(config: Config, reporter: Reporter) -> Document:
    """Writes the page."""
    with RunDirectory.open(config) as directory:
        return Session(config, reporter, directory).report()
