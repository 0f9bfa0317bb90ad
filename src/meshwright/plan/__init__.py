"""Predict what a layout needs and how fast it is, and search for the best. Loads no torch."""

from meshwright.plan.decision import Decision, Offer, decide, make_offer
from meshwright.plan.fit import Rejected
from meshwright.plan.held import predict_states
from meshwright.plan.machine import local_cluster
from meshwright.plan.memory import predict_memory
from meshwright.plan.objective import Goal, Objective, check_goal
from meshwright.plan.plan import Plan, build_plan, predict
from meshwright.plan.rehearsal import build_paces, fullest_rank, library_bytes, rank_memory, rank_step
from meshwright.plan.time import predict_step, share_machine

__all__ = [
    "Decision",
    "Goal",
    "Objective",
    "Offer",
    "Plan",
    "Rejected",
    "build_paces",
    "build_plan",
    "check_goal",
    "decide",
    "fullest_rank",
    "library_bytes",
    "local_cluster",
    "make_offer",
    "predict",
    "predict_memory",
    "predict_states",
    "predict_step",
    "rank_memory",
    "rank_step",
    "share_machine",
]
