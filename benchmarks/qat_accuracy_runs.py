"""Runs of the accuracy benchmark: which net, seed and setting, by which recipe, and where their results are kept.

A folder holds the runs of one recipe, each a JSON file that is written whole, and beside them the float nets.

The first layer's input and weight, and what the last layer reads, multiplies by and gives have 8 bits, whatever the
others have (as in Esser et al., "Learned Step Size Quantization", 2020, section 3). Batch norms stay live in training
(preset int8_per_channel_qat) and are folded in the lowered net.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

import fxquant
from benchmarks.qat_networks import CLASSIFIER, STEM
from benchmarks.runner import Json, write_json
from fxquant.errors import FxquantError
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import Pipeline
from fxquant.passes.assign_specs import AssignSpecs
from fxquant.placement import Rule
from fxquant.spec import SpecOverride

RECIPE_FILE = "recipe.json"
EIGHT_BITS = SpecOverride(bits=8)
ENDS = (
    Rule(module=rf"{STEM}\.0", input=EIGHT_BITS, weight=EIGHT_BITS),
    Rule(module=CLASSIFIER, activation=EIGHT_BITS, weight=EIGHT_BITS),
)


class FolderTaken(FxquantError):
    """The folder holds results of another recipe."""


class Method(Enum):
    """What is measured; all but FLOAT start from its weights."""

    FLOAT = "float"
    FLOAT_LONGER = "float, trained on"
    PTQ = "PTQ"
    FIXED = "QAT, fixed ranges"
    LEARNED = "QAT, learned ranges"

    @property
    def is_quantized(self) -> bool:
        """Whether the net is lowered to integers."""
        return self not in (Method.FLOAT, Method.FLOAT_LONGER)


@dataclass(frozen=True)
class Bits:
    """Bits of weights and of activations."""

    weight: int
    activation: int

    def __str__(self) -> str:
        return f"W{self.weight}A{self.activation}"


W8A8, W4A8, W4A4 = Bits(8, 8), Bits(4, 8), Bits(4, 4)


@dataclass(frozen=True)
class Setting:
    """A method, and the bits that it quantizes to (None in float)."""

    method: Method
    bits: Bits | None = None

    def __str__(self) -> str:
        return self.method.value if self.bits is None else f"{self.bits} {self.method.value}"

    @property
    def key(self) -> str:
        """The setting in a file's name."""
        method = self.method.name.lower().replace("_", "-")
        return method if self.bits is None else f"{str(self.bits).lower()}-{method}"

    def pipeline(self) -> Pipeline:
        """The preset for training with this setting's bits and ranges, first and last layer at 8 bits."""
        assert self.bits is not None
        learns = self.method is Method.LEARNED
        # Below 8 bits a grid that reaches to the extremes wastes codes. A grid that follows its weight keeps to them
        # in training: it would be searched again at every step. Weights' ranges are not learned here: those of folded
        # weights move with the running variance, and at 4 bits learned ones lagged behind it.
        searched = "mse" if self.bits.activation < 8 else None
        searched_once = "mse" if self.bits.weight < 8 and self.method is Method.PTQ else None
        activation = SpecOverride(
            bits=self.bits.activation, estimator=searched, training="lsq+" if learns else "static"
        )
        weight = SpecOverride(bits=self.bits.weight, estimator=searched_once)
        chosen = fxquant.load_pipeline("int8_per_channel_qat").override(activation, weight)
        passes = [
            replace(item, rules=ENDS) if isinstance(item, AssignSpecs) else item for item in chosen.prepare_passes
        ]
        return Pipeline(PassManager(passes), chosen.finalize_passes, chosen.target, chosen.name, chosen.catalogue)


@dataclass(frozen=True)
class Run:
    """One cell of the table for one seed."""

    network: str
    seed: int
    setting: Setting

    @property
    def key(self) -> str:
        """The name of its files."""
        return f"{self.network}-{self.seed}-{self.setting.key}"


@dataclass(frozen=True)
class TrainingPlan:
    """SGD with Nesterov momentum 0.9: the learning rate rises over `warmup` of the steps and falls by a half cosine."""

    epochs: int
    learning_rate: float
    warmup: float
    weight_decay: float = 5e-4
    range_learning_rate: float | None = None

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` of `steps`."""
        rising = self.warmup * steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's figures but network, seed and setting."""

    data: str
    float_training: TrainingPlan
    quantized_training: TrainingPlan
    batch: int = 128
    train_images: int | None = None
    test_images: int | None = None
    calibration_images: int = 1024
    parity_images: int = 500

    def to_dict(self) -> dict[str, Json]:
        """The fields as JSON has them."""
        found: dict[str, Json] = json.loads(json.dumps(asdict(self)))
        return found


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Arguments:
        correct, images: right answers among the test images; of onnxruntime where the setting is quantized.
        loss: mean training loss of the last steps; None without training.
        codes_compared, codes_differing: between `exact` and onnxruntime, over all quantized values of the lowered net.
        logits_differing: numbers that the trained module's last `exact` evaluation gives otherwise than onnxruntime.
        seconds: wall clock.
    """

    correct: int
    images: int
    loss: float | None = None
    codes_compared: int = 0
    codes_differing: int = 0
    logits_differing: int = 0
    seconds: float = 0.0

    @property
    def points(self) -> float:
        """Accuracy in percent."""
        return 100 * self.correct / self.images


@dataclass(frozen=True)
class Store:
    """The folder of results: `<run>.json`, `<net>-<seed>.pt`, and the recipe."""

    folder: Path

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe down, or raise FolderTaken where another one is."""
        path = self.folder / RECIPE_FILE
        if not path.exists():
            write_json(path, recipe.to_dict())
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != recipe.to_dict():
            got = ", ".join(key for key, value in recipe.to_dict().items() if there.get(key) != value)
            remedy = "Choose another --folder, or delete this one."
            raise FolderTaken(
                "folder of runs", place=str(path), expected="this recipe", got=f"other {got}", remedy=remedy
            )

    def find(self, run: Run) -> Outcome | None:
        """What was stored of `run`."""
        path = self.folder / f"{run.key}.json"
        return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def keep(self, run: Run, outcome: Outcome) -> None:
        """Store it."""
        write_json(self.folder / f"{run.key}.json", asdict(outcome))

    def weights(self, run: Run) -> Path:
        """Where the float weights are that `run` starts from."""
        return self.folder / f"{run.network}-{run.seed}.pt"
