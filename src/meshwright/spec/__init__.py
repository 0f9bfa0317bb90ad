"""Model, layout, cluster, job: frozen types, decoded and checked once at the edge. Loads no torch."""

from meshwright.spec.cluster import Cluster, Device, Link
from meshwright.spec.count import Flops, block_shapes, count_flops, count_parameters, parameter_shapes
from meshwright.spec.errors import SettingError, closest
from meshwright.spec.job import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    Job,
    OptimizerSettings,
    RunSettings,
    TraceSettings,
    check_job,
)
from meshwright.spec.layout import AXES, OFFERED_AXES, Axis, Layout, Precision, check_layout
from meshwright.spec.model import ZOO, ModelSpec, check_model

__all__ = [
    "AXES",
    "OFFERED_AXES",
    "ZOO",
    "Axis",
    "CheckpointSettings",
    "Cluster",
    "DataSettings",
    "Device",
    "EvaluationSettings",
    "Flops",
    "Job",
    "Layout",
    "Link",
    "ModelSpec",
    "OptimizerSettings",
    "Precision",
    "RunSettings",
    "SettingError",
    "TraceSettings",
    "block_shapes",
    "check_job",
    "check_layout",
    "check_model",
    "closest",
    "count_flops",
    "count_parameters",
    "parameter_shapes",
]
