"""Run the demo from Python, one cell at a time, as in a notebook.

    make demo                                # fetches the demo's model and data into demo/
    python examples/notebook.py demo/demo.yaml [section.field=value ...]

Editors and notebooks show each `# %%` as a cell. A finished stage is not run again.
"""

# %% The run file, checked before anything is loaded.
import sys

import post_dist

run_file = sys.argv[1]
settings = sys.argv[2:]
config = post_dist.load_run(run_file, settings)
print(f"{config.name}: {config.tune.num_virtual_tokens} prompt tokens on {config.teacher.path}")

# %% The privacy cost. With `privacy.enabled=true`, `tune` uses this noise.
if config.privacy.enabled:
    cost = post_dist.account(config)
    print(f"epsilon {cost.epsilon:.2f} at delta {cost.delta:g}, by {cost.accountant}")

# %% Provider: a student of the large LLM.
student = post_dist.distill(config)
for measure, value in student.held_out.items():
    print(f"{measure}: {value}")

# %% Owner: a soft prompt on the student, from the private data.
tuned = post_dist.tune(config)
print(f"the owner hands over {tuned.artifact}")

# %% Provider: the same prompt for the large LLM, with public text alone.
(transferred,) = post_dist.transfer(config).prompts

# %% The comparison.
evaluation = post_dist.evaluate(config)
print(evaluation)

# %% What the prompt claims, read and checked as its receiver does.
prompt = post_dist.load_prompt(transferred.artifact)
tokens, width = prompt.embeddings.shape
print(f"{tokens} vectors of width {width} for the template {prompt.task.template!r}")
print(f"epsilon: {prompt.epsilon}")
