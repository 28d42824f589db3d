"""fxquant: a graph-rewriting quantizer on torch.fx whose simulated integers are the integers that onnxruntime runs."""

from __future__ import annotations

from importlib.metadata import version

from fxquant.analysis import AnalysisReport, analyze
from fxquant.calibration import calibrate
from fxquant.capture import capture
from fxquant.encodings import LoadedEncodings, load_encodings, save_encodings
from fxquant.errors import FxquantError
from fxquant.graph.manager import PassManager
from fxquant.graph.pass_data import PassData
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program, Stage
from fxquant.graph.storage import load_program
from fxquant.lowering.export import export_onnx
from fxquant.parity import ParityReport, check_parity
from fxquant.schedule import Schedule
from fxquant.sim import QuantSim
from fxquant.simulation import Strategy, strategies
from fxquant.spec import Encoding, Granularity, Limits, QuantSpec, SpecOverride, Target
from fxquant.train import train_qat
from fxquant.training.batch_norm import ReestimatedStatistics, reestimate_batch_norm
from fxquant.training.distributed import synchronise
from fxquant.training.history import EpochRecord, TrainingResult
from fxquant.training.parameter_groups import parameter_groups
from fxquant.training.schedule_runner import ScheduleRunner
from fxquant.tuning.auto_quant import auto_quantize
from fxquant.tuning.auto_quant_result import AutoQuantResult
from fxquant.tuning.auto_quant_steps import AddedPass, Combination, Step, default_steps
from fxquant.tuning.candidates import Candidate
from fxquant.tuning.mixed_precision import tune_precision
from fxquant.tuning.result import TuningResult
from fxquant.tuning.target import Drop

__version__ = version("fxquant")

__all__ = [
    "AddedPass",
    "AnalysisReport",
    "AutoQuantResult",
    "Candidate",
    "Combination",
    "Drop",
    "Encoding",
    "EpochRecord",
    "FxquantError",
    "Granularity",
    "Limits",
    "LoadedEncodings",
    "ParityReport",
    "PassData",
    "PassManager",
    "Pipeline",
    "Program",
    "QuantSim",
    "QuantSpec",
    "ReestimatedStatistics",
    "Schedule",
    "ScheduleRunner",
    "SpecOverride",
    "Stage",
    "Step",
    "Strategy",
    "Target",
    "TrainingResult",
    "TuningResult",
    "analyze",
    "auto_quantize",
    "calibrate",
    "capture",
    "check_parity",
    "default_steps",
    "export_onnx",
    "load_encodings",
    "load_pipeline",
    "load_program",
    "parameter_groups",
    "reestimate_batch_norm",
    "save_encodings",
    "strategies",
    "synchronise",
    "train_qat",
    "tune_precision",
]
