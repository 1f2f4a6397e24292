"""Submitting from Python: the same jobs as `post-dist submit RUN.yaml pipeline --wait`."""

import sys
from pathlib import Path

from post_dist.cluster.follow import follow
from post_dist.cluster.submit import planned_jobs, submit_jobs, try_jobs
from post_dist.config.load import load_run

run = Path(sys.argv[1])
config = load_run(run, None, None)
jobs = planned_jobs(config, run, "pipeline", ())
try_jobs(config, jobs)
follow(submit_jobs(config, jobs), print)
