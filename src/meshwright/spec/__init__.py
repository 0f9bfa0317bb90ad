"""Model, layout, cluster, job: frozen types, decoded and checked once at the edge. Loads no torch."""

from meshwright.spec.cluster import Cluster, Device, Link
from meshwright.spec.count import Flops, block_shapes, count_flops, count_parameters, end_shapes, parameter_shapes
from meshwright.spec.errors import SettingError, closest
from meshwright.spec.family import (
    BUILT_FAMILIES,
    FAMILIES,
    SPLIT_TABLES,
    Family,
    FamilyName,
    Split,
    SplitTable,
    split_of,
)
from meshwright.spec.job import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    Job,
    OptimizerSettings,
    RunSettings,
    Source,
    TraceSettings,
    check_job,
)
from meshwright.spec.layout import (
    AXES,
    OFFERED_AXES,
    Axis,
    Layout,
    Precision,
    Recompute,
    check_axes,
    check_layout,
    check_split,
)
from meshwright.spec.model import Experts, LatentAttention, ModelSpec, RopeScaling, check_built, check_model
from meshwright.spec.numbers import nearest_divisor
from meshwright.spec.zoo import ZOO, NamedModel

__all__ = [
    "AXES",
    "BUILT_FAMILIES",
    "FAMILIES",
    "OFFERED_AXES",
    "SPLIT_TABLES",
    "ZOO",
    "Axis",
    "CheckpointSettings",
    "Cluster",
    "DataSettings",
    "Device",
    "EvaluationSettings",
    "Experts",
    "Family",
    "FamilyName",
    "Flops",
    "Job",
    "LatentAttention",
    "Layout",
    "Link",
    "ModelSpec",
    "NamedModel",
    "OptimizerSettings",
    "Precision",
    "Recompute",
    "RopeScaling",
    "RunSettings",
    "SettingError",
    "Source",
    "Split",
    "SplitTable",
    "TraceSettings",
    "block_shapes",
    "check_axes",
    "check_built",
    "check_job",
    "check_layout",
    "check_model",
    "check_split",
    "closest",
    "count_flops",
    "count_parameters",
    "end_shapes",
    "nearest_divisor",
    "parameter_shapes",
    "split_of",
]
