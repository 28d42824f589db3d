"""Weights' rounding learned layer by layer or block by block, against what the float program computes there."""

from fxquant.reconstruction.learn import Reconstruction as Reconstruction
from fxquant.reconstruction.learn import reconstruct as reconstruct
from fxquant.reconstruction.samples import Collector as Collector
from fxquant.reconstruction.samples import Samples as Samples
from fxquant.reconstruction.samples import collect as collect
from fxquant.reconstruction.settings import Settings as Settings
from fxquant.reconstruction.soft_rounding import SoftRounding as SoftRounding
from fxquant.reconstruction.unfinished import Unfinished as Unfinished
from fxquant.reconstruction.units import Unit as Unit
