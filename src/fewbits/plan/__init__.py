"""The plan: for every module its shape, spec, tensors, kernel and the reason, from config and headers alone.

`fewbits inspect` prints this object and `load` executes it. Every tensor of the folder is claimed by a row or
stands in the leftovers; every module that the family needs is filled by a row, or there is an error.
"""

from fewbits.plan.planner import plan
from fewbits.plan.rows import Execution, LoadPlan, Row, failed, no_kernel, require_runnable

__all__ = ["Execution", "LoadPlan", "Row", "failed", "no_kernel", "plan", "require_runnable"]
