"""The public names of mars_jax, by theme."""
# isort: skip_file

__version__: str

# Adapters: which linears are adapted, how, and what the adapters hold.
from .adapters.files import read_adapters as read_adapters
from .adapters.files import write_adapters as write_adapters
from .adapters.lora import AlphaRule as AlphaRule
from .adapters.merge import merge as merge
from .adapters.merge import unmerge as unmerge
from .adapters.method import AdapterMethod as AdapterMethod
from .adapters.method import Leaf as Leaf
from .adapters.registry import METHODS as METHODS
from .adapters.targets import find_targets as find_targets
from .adapters.targets import parameters_per_rank as parameters_per_rank
from .adapters.tree import init_adapters as init_adapters
from .adapters.tree import join_trainable as join_trainable
from .adapters.tree import split_trainable as split_trainable

# Laws and convergence: convergence times, the two scaling laws, balance.
from .laws.balance import balanced_rank as balanced_rank
from .laws.convergence.base import converge as converge
from .laws.convergence.base import Convergence as Convergence
from .laws.convergence.base import ConvergenceRule as ConvergenceRule
from .laws.convergence.base import Rule as Rule
from .laws.convergence.registry import RULES as RULES
from .laws.fit import fit_laws as fit_laws
from .laws.fit import Laws as Laws
from .laws.law_c import ConvergenceLaw as ConvergenceLaw
from .laws.law_c import ConvergenceTimes as ConvergenceTimes
from .laws.law_c import fit_convergence_law as fit_convergence_law
from .laws.law_p import fit_performance_law as fit_performance_law
from .laws.law_p import PerformanceLaw as PerformanceLaw
from .laws.records import LaneRecord as LaneRecord
from .laws.records import read_records as read_records

# Lanes: many training runs in one compiled program.
from .lanes.engine import Engine as Engine
from .lanes.engine import EngineShape as EngineShape
from .lanes.engine import make_engine as make_engine
from .lanes.engine import Training as Training
from .lanes.eval_points import EvalPoint as EvalPoint
from .lanes.inputs import Hooks as Hooks
from .lanes.inputs import LaneInputs as LaneInputs
from .lanes.lane import Lane as Lane
from .lanes.loop import run_group as run_group
from .lanes.result import best_adapters as best_adapters
from .lanes.result import GroupResult as GroupResult
from .lanes.schedule import eval_steps as eval_steps
from .lanes.schedule import Schedule as Schedule
from .lanes.schedule import warmup_multipliers as warmup_multipliers
from .lanes.step import mean_loss as mean_loss
from .lanes.stopping import AskEach as AskEach
from .lanes.stopping import Halving as Halving
from .lanes.stopping import Patience as Patience
from .lanes.stopping import StoppingRule as StoppingRule

# Models: the families and their Linen modules.
from .models.families.base import Family as Family
from .models.families.registry import build_model as build_model
from .models.families.registry import FAMILIES as FAMILIES
from .models.families.registry import model_config as model_config

# Hub: checkpoints and PEFT adapters.
from .hub.adapter import read_adapter as read_adapter
from .hub.adapter import write_adapter as write_adapter
from .hub.read import read_checkpoint as read_checkpoint
from .hub.verify import verify_adapter as verify_adapter
from .hub.verify import verify_merged as verify_merged
from .hub.write import write_checkpoint as write_checkpoint
from .hub.write import write_merged as write_merged

# Data: samples to batches.
from .data.batches import eval_batches as eval_batches
from .data.batches import stream as stream
from .data.examples import ExampleSource as ExampleSource
from .data.formats.base import Format as Format
from .data.formats.registry import FORMATS as FORMATS
from .data.preprocessor import load_preprocessor as load_preprocessor
from .data.records import load_records as load_records
from .data.shapes import plan_shapes as plan_shapes

# Search: strategies, on real lanes or on recorded curves.
from .search.recorded_trainer import RecordedTrainer as RecordedTrainer
from .search.selection import Selection as Selection
from .search.strategies.base import Budget as Budget
from .search.strategies.base import Outcome as Outcome
from .search.strategies.base import Space as Space
from .search.strategies.base import Strategy as Strategy
from .search.strategies.registry import STRATEGIES as STRATEGIES
from .search.trainer import Configuration as Configuration
from .search.trainer import Curve as Curve
from .search.trainer import Trainer as Trainer

# Runs: what the commands do.
from .config.load import Config as Config
from .config.load import load_config as load_config
from .job.phase import Phase as Phase
from .pipeline import run_pipeline as run_pipeline
from .report.page import write_report as write_report
