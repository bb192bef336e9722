"""What a job or a sweep will cost, told before anything is loaded: operations, bytes moved, memory, and time by stage.

Counts (`counting`: of a forward pass, by running the model's own code without weights) make stages (`stages`), the rates of a
machine (`svnup.machines`) make times of them, and `text` tells both.
"""

from svnup.plan.stages import JobCounts, Plan, Stage, machine_of, plan
from svnup.plan.sweep import SharedWork, SweepPlan, plan_of_sweep
from svnup.plan.text import told, told_of_sweep, too_small

__all__ = [
    "JobCounts",
    "Plan",
    "SharedWork",
    "Stage",
    "SweepPlan",
    "machine_of",
    "plan",
    "plan_of_sweep",
    "told",
    "told_of_sweep",
    "too_small",
]
