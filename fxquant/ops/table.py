"""The default table of operations: every family together. Users register theirs with `TABLE.register(OpDef(...))`."""

from __future__ import annotations

from fxquant.ops.activation import ACTIVATION
from fxquant.ops.attention import ATTENTION
from fxquant.ops.base import OpTable, table_of
from fxquant.ops.casting import CASTING
from fxquant.ops.comparison import COMPARISON
from fxquant.ops.convolution import CONVOLUTION
from fxquant.ops.creation import CREATION
from fxquant.ops.elementwise import ELEMENTWISE
from fxquant.ops.embedding import EMBEDDING
from fxquant.ops.float_forms import with_float_forms
from fxquant.ops.indexing import INDEXING
from fxquant.ops.linear import LINEAR
from fxquant.ops.normalization import NORMALIZATION
from fxquant.ops.pooling import POOLING
from fxquant.ops.reduction import REDUCTION
from fxquant.ops.resize import RESIZE
from fxquant.ops.shape import SHAPE

TABLE: OpTable = table_of(
    with_float_forms(family)
    for family in (
        CONVOLUTION,
        LINEAR,
        POOLING,
        NORMALIZATION,
        ATTENTION,
        EMBEDDING,
        ELEMENTWISE,
        ACTIVATION,
        SHAPE,
        INDEXING,
        REDUCTION,
        RESIZE,
        CREATION,
        CASTING,
        COMPARISON,
    )
)
