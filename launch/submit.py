"""Submit from Python: the same jobs as `post-dist submit RUN.yaml pipeline --wait`.

python launch/submit.py RUN.yaml
"""

import sys
from pathlib import Path

from post_dist.cluster.follow import follow
from post_dist.cluster.job import RunSource
from post_dist.cluster.submit import planned_jobs, submit_jobs, try_jobs

source = RunSource.of_command(Path(sys.argv[1]))
config = source.load()
jobs = planned_jobs(config, source, "pipeline")
try_jobs(config, jobs)
follow(submit_jobs(config, jobs), print)
