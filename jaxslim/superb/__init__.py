"""micro-SUPERB: a small offline stand-in for SUPERB (Yang et al., arXiv 2105.01051) on the bundled prompts.

`suite.evaluate` runs it; a file is a task or a part of it: `clips` and `upstreams` (what is heard, who hears it),
`features` (cached, standardised), `heads` (what learns), `recognition`, `keywords`, `query`, `voices` (the tasks),
`fidelity` (without labels), `metrics`, `retention` (the score).
"""
from jaxslim.superb.suite import NAMES, TASKS, TEACHER, evaluate, options, render
from jaxslim.superb.tasks import Options

__all__ = ["NAMES", "TASKS", "TEACHER", "Options", "evaluate", "options", "render"]
