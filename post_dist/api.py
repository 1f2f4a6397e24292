"""The Python API: what the command line does, for a script or a notebook.

    import post_dist

    config = post_dist.load_run("run.yaml", ["privacy.target_epsilon=8"])
    cost = post_dist.account(config)           # before any run
    student = post_dist.distill(config)        # provider
    prompt = post_dist.tune(config)            # owner
    post_dist.transfer(config)                 # provider
    print(post_dist.evaluate(config))          # the table
    post_dist.load_prompt(prompt.artifact).predict(["a text"], model=student.artifact)

A stage needs the results of the earlier stages, or the artifacts that the run file names in
`inputs`. A finished stage is not run again: its result is returned. An interrupted stage resumes
from its last checkpoint.

In a script that torchrun or another launcher starts, all ranks call the same functions and get the
same results. The process group stays up between calls; end such a script with
`torch.distributed.destroy_process_group()`.

Importing this module does not load torch. Errors that a user can fix are raised as subclasses of
`PostDistError`, with a hint.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.config import load
from post_dist.config.arguments import checked
from post_dist.config.public_keys import read_public_key
from post_dist.config.schema import STAGE_SECTIONS, RunConfig, Stage
from post_dist.config.sections import PositiveInt
from post_dist.data.corpus_result import CorpusResult
from post_dist.errors import (
    ArtifactRefused,
    EnvironmentFault,
    InputError,
    Interrupted,
    PrivacyRefused,
)
from post_dist.results import (
    EvaluationResult,
    PrivacyCost,
    PromptResult,
    PublicPromptResult,
    SignalsResult,
    StudentResult,
    TimedSettings,
    TransferResult,
)
from post_dist.runtime.private_process import forgetting_private_data
from post_dist.runtime.ranks import joined_ranks, leave_ranks, one_call_at_a_time
from post_dist.runtime.stop import listening, stopped, was_requested

if TYPE_CHECKING:
    from post_dist.artifacts.run_folder import RunFolder
    from post_dist.privacy.plan import PrivacyPlan
    from post_dist.runtime.distributed import World
    from post_dist.serving.prompt import Prompt
    from post_dist.stages.pipeline import Pipeline

Resume = Literal["auto", "never"]
"""auto: resume an unfinished stage from its last checkpoint. never: start it from its beginning."""
_Result = TypeVar("_Result")
_Minutes = Annotated[float, Field(gt=0, le=1e6)]
_ALL_STAGES: frozenset[Stage] = frozenset(STAGE_SECTIONS)
_RESUMES = "the same command resumes from the last checkpoint"


@checked
def load_run(
    path: str | Path, overrides: Sequence[str] = (), output: str | Path | None = None
) -> RunConfig:
    """Read and check a run file.

    Args:
        path: the YAML file; relative paths in it are read from its folder.
        overrides: strings such as `transfer.alpha=0.5`, as `--set` takes them.
        output: folder for the run folders; replaces `output` of the run file.

    Returns:
        The checked settings. They cannot be changed.

    Raises:
        InputError: the file is missing, is not YAML, or breaks the schema. The message lists every
            error.

    Examples:
        >>> from post_dist.config.assets import asset
        >>> config = load_run(asset("examples/demo.yaml"), ["tune.steps=200"])
        >>> config.name, config.tune.steps
        ('demo', 200)
    """
    return load.load_run(Path(path), list(overrides), None if output is None else Path(output))


@checked
def tokenize_corpus(config: RunConfig) -> CorpusResult:
    """Tokenize the corpus on CPUs, before a job that needs GPUs (optional: `distill` does it too).

    It loads the teacher's tokenizer, and none of its weights. Students and runs that share
    `output` share the result.

    Args:
        config: a run file with the sections `teacher` and `corpus`.

    Returns:
        The tokenized corpus.

    Raises:
        InputError: a section is missing, a file cannot be read, or the text is too short.
        ArtifactRefused: an existing shard is not as it was written.
        EnvironmentFault: the hub cannot be reached, the disk is full, or a process has died.
        Interrupted: the call was asked to stop; the same call goes on.
    """
    with listening():
        from post_dist.runtime.logs import configure_logging
        from post_dist.stages import corpus

        configure_logging(0)
        return corpus.tokenize_corpus(config)


@checked
def write_signals(config: RunConfig) -> SignalsResult:
    """Write the teacher's signals that `distill` will read (optional: `distill` does it too).

    Any number of processes, or groups of ranks, may call it for one run file at the same time. Each
    returns once all files exist. The files of a process that dies are made by the others.

    Args:
        config: a run file with the sections of `distill`; `distill.cache` is not `none`.

    Returns:
        The signals.

    Raises:
        InputError: a section or a file is missing, or the settings do not fit the teacher.
        EnvironmentFault: the disk is full, or another rank was lost.
        Interrupted: the call was asked to stop; complete files are kept.
    """

    def run(stages: "Pipeline", world: "World") -> SignalsResult:
        folder, count = stages.signals()
        return SignalsResult(folder, count)

    return _with_stages(config, frozenset(("distill",)), "auto", run)


@checked
def distill(config: RunConfig, *, resume: Resume = "auto") -> StudentResult:
    """Distill the large LLM into a student (the provider's first stage).

    Args:
        config: a run file with the sections `teacher`, `student` and `corpus`.
        resume: what to do with an unfinished run of the same settings.

    Returns:
        The student.

    Raises:
        InputError: a section or a file is missing, or the settings do not fit the teacher.
        EnvironmentFault: the disk is full, the folder is in use, or another rank was lost.
        Interrupted: the run was asked to stop; its state is saved.
    """

    def run(stages: "Pipeline", world: "World") -> StudentResult:
        folder = stages.distill()
        # Only rank 0 reads files: on NFS another node may not see a new file for half a minute.
        return world.on_main(lambda: _student_result(folder))

    return _with_stages(config, frozenset(("distill",)), resume, run)


@checked
def warm_start(config: RunConfig, *, resume: Resume = "auto") -> PublicPromptResult:
    """Tune a prompt on the student with public text, for private tuning to start from.

    It learns the zero-shot scores of the large LLM. No private data is read.

    Args:
        config: a run file with the sections `teacher`, `public_task` and `warm_start`. The public
            task has a template and label words.
        resume: what to do with an unfinished run of the same settings.

    Returns:
        The public prompt.

    Raises:
        InputError: the student does not exist yet, or a section or a file is missing or wrong.
        EnvironmentFault: the disk is full, the folder is in use, or another rank was lost.
        Interrupted: the run was asked to stop; its state is saved.
    """

    def run(stages: "Pipeline", world: "World") -> PublicPromptResult:
        folder = stages.warm_start()
        return PublicPromptResult(folder.path, folder.artifact)

    return _with_stages(config, frozenset(("warm_start",)), resume, run)


@checked
def settings_for_minutes(config: RunConfig, minutes: _Minutes) -> TimedSettings:
    """Choose the settings of a private run that takes some minutes on this machine.

    It loads the student and times gradients of random text. No private data is read. The choice is
    kept in `output`, so the same call returns the same settings from then on.

    Args:
        config: a run file with the section `private_task`, `privacy.enabled`, and a student that
            exists.
        minutes: the longest time for the private steps, and for reading the examples.

    Returns:
        The settings.

    Raises:
        InputError: the student does not exist yet, there is no private run to plan, or there is
            too little time for one.
        Interrupted: the call was asked to stop.
    """

    def run(stages: "Pipeline", world: "World") -> TimedSettings:
        return TimedSettings(**stages.settings_for_minutes(minutes))

    return _with_stages(config, frozenset(), "auto", run)


@checked
def tune(config: RunConfig, *, resume: Resume = "auto") -> PromptResult:
    """Tune a soft prompt on the student with the private data (the owner's stage).

    Args:
        config: a run file with the section `private_task`. With `privacy.enabled`, tuning is
            DP-SGD.
        resume: what to do with an unfinished run of the same settings.

    Returns:
        The prompt on the student.

    Raises:
        InputError: the student does not exist yet, or a section or a file is missing or wrong.
        PrivacyRefused: the ledger of the data set does not allow the run, or the accountants
            disagree.
        EnvironmentFault: the disk is full, the folder is in use, or another rank was lost.
        Interrupted: the run was asked to stop; its state is saved.
    """

    def run(stages: "Pipeline", world: "World") -> PromptResult:
        folder = stages.tune()
        # An owner knows a given student by its own folder, not by its checked copy.
        student = config.inputs.student or stages.student
        return world.on_main(lambda: _prompt_result(folder, student))

    return _with_stages(config, frozenset(("tune",)), resume, run)


@checked
def transfer(config: RunConfig, *, resume: Resume = "auto") -> TransferResult:
    """Transfer the soft prompt to the large LLM with public text (the provider's second stage).

    Args:
        config: a run file with the sections `teacher` and `public_task`.
        resume: what to do with an unfinished run of the same settings.

    Returns:
        The prompts on the large LLM, one for each source prompt.

    Raises:
        ArtifactRefused: a source prompt fails its checks, or does not belong to these models.
        InputError: the student or the prompt does not exist yet, or a section or a file is missing
            or wrong.
        EnvironmentFault: the disk is full, the folder is in use, or another rank was lost.
        Interrupted: the run was asked to stop; its state is saved.
    """

    def run(stages: "Pipeline", world: "World") -> TransferResult:
        folders = stages.transfer()
        prompts = world.on_main(lambda: [_prompt_result(folder) for folder in folders])
        return TransferResult(tuple(prompts))

    return _with_stages(config, frozenset(("transfer",)), resume, run)


@checked
def evaluate(config: RunConfig, *, resume: Resume = "auto") -> EvaluationResult:
    """Compare zero-shot, the prompts and the baselines on one split.

    Args:
        config: a run file with the section `private_task`. Without `teacher`, only the student is
            evaluated.
        resume: what to do with an unfinished run of the same settings.

    Returns:
        The table. Only `pipeline` also writes the report page.

    Raises:
        ArtifactRefused: a prompt fails its checks, or does not belong to these models or this task.
        InputError: an earlier stage is not finished, or a section or a file is missing or wrong.
        EnvironmentFault: the disk is full, the folder is in use, or another rank was lost.
        Interrupted: the run was asked to stop; its state is saved.
    """

    def run(stages: "Pipeline", world: "World") -> EvaluationResult:
        folder = stages.evaluate()
        return world.on_main(lambda: _evaluation_result(folder, with_report=False))

    return _with_stages(config, frozenset(("evaluate",)), resume, run)


@checked
def pipeline(config: RunConfig, *, resume: Resume = "auto") -> EvaluationResult:
    """Run the three stages and the evaluation, and write the report page.

    Args:
        config: a run file with the sections of all stages, or with `inputs` in their place.
        resume: what to do with an unfinished run of the same settings.

    Returns:
        The table, and its page in `report`.

    Raises:
        PostDistError: any error of the functions `distill`, `tune`, `transfer` and `evaluate`.
    """

    def run(stages: "Pipeline", world: "World") -> EvaluationResult:
        folder = stages.everything()
        return world.on_main(lambda: _evaluation_result(folder, with_report=True))

    return _with_stages(config, _ALL_STAGES, resume, run)


@checked
def audit_membership(
    config: RunConfig, *, shadows: PositiveInt = 8, rows: PositiveInt = 1000
) -> dict[str, Any]:
    """Measure how well an attacker tells which private rows a prompt was tuned on (LiRA).

    It tunes shadow prompts with the settings and the epsilon of the run file, each on half of the
    rows, and transfers them if the run file has `teacher` and `public_task`. The numbers are
    computed from private rows, and no epsilon covers them. They stay with the owner.

    Args:
        config: a run file with the section `private_task`, whose student exists.
        shadows: number of shadow prompts; even, 4 or more.
        rows: number of rows of the training split in the attack.

    Returns:
        `student_auc`, its standard error and the true-positive rate at 1% false positives; the
        same for `transferred`; and the bound on that rate that epsilon gives.

    Raises:
        InputError: the student does not exist yet, or the task or a number does not suit the
            attack.
        EnvironmentFault: the disk is full, the folder is in use, or another rank was lost.
        Interrupted: the audit was asked to stop; the same call goes on.
    """

    def run(stages: "Pipeline", world: "World") -> dict[str, Any]:
        from post_dist.stages.membership import MembershipAttack, audit_membership

        return audit_membership(config, MembershipAttack(shadows, rows), stages, world)

    return _with_stages(config, frozenset(), "auto", run)


def account(plan: "PrivacyPlan | RunConfig") -> PrivacyCost:
    """Compute the privacy cost of private tuning, before any run.

    It reads no data and no model.

    Args:
        plan: a plan, or a run file whose `privacy` gives a noise multiplier or a target epsilon.

    Returns:
        Epsilon with its cross-checks, and the noise multiplier that meets a target epsilon.

    Raises:
        InputError: the run file lacks a number that the plan needs, or no noise multiplier reaches
            its target epsilon.
        PrivacyRefused: the accountants disagree.

    Examples:
        >>> from post_dist.config.assets import asset
        >>> config = load_run(asset("examples/demo.yaml"), ["privacy.target_epsilon=8"])
        >>> cost = account(config)
        >>> 7.9 < cost.epsilon <= 8
        True
        >>> cost.steps, cost.private
        (400, True)
    """
    from post_dist.privacy import accounting, calibration
    from post_dist.privacy.plan import PrivacyPlan

    # If the run file gives a target epsilon, this first searches for the noise multiplier.
    if isinstance(plan, RunConfig):
        plan = calibration.private_plan(plan)
    if not isinstance(plan, PrivacyPlan):
        raise InputError(
            "account: plan is not a run file that `load_run` has read "
            f"(found {type(plan).__name__})"
        )
    cost = accounting.account(plan)
    return PrivacyCost(
        epsilon=cost.epsilon,
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        sampling_probability=plan.sampling_probability,
        steps=plan.steps,
        accountant=cost.accountant,
        cross_checks=cost.cross_checks,
        epsilon_at_delta=cost.epsilon_at,
        true_positive_rate_at_1_percent_false=cost.true_positive_rate,
        mean_trials=plan.mean_trials,
        private=plan.private,
    )


@checked
def load_prompt(folder: str | Path, *, keys: Sequence[str | Path] = ()) -> "Prompt":
    """Read a soft prompt from an untrusted folder, and check it.

    Args:
        folder: artifact of `tune` or `transfer`, such as `runs/demo/tune-1a2b3c4d/artifact`.
        keys: trusted public keys, as lines or `.pub` files. One of them must have signed the
            prompt. Without any, a prompt need not be signed.

    Returns:
        The prompt: `embeddings` `[n, d]` in fp32, its `task`, and the `epsilon` that it claims. Its
        method `predict` uses it on its model.

    Raises:
        ArtifactRefused: its kind, hash, size, header, dtype or shape is wrong, a value is out of
            range, its epsilon is not what its plan gives, or no trusted key has signed it.
        InputError: a key is not a public key.

    Examples:
        >>> load_prompt("received/prompt")
        Traceback (most recent call last):
        ...
        post_dist.errors.ArtifactRefused: received/prompt: it cannot be opened: ...
    """
    from post_dist.serving.prompt import Prompt

    trusted = [read_public_key(str(key)) for key in keys]
    return Prompt.admitted(Path(folder), keys=trusted)


def _with_stages(
    config: RunConfig,
    may_run: frozenset[Stage],
    resume: Resume,
    run: Callable[["Pipeline", "World"], _Result],
) -> _Result:
    """Join the ranks and run stages; raise Ctrl-C and a lost rank as errors with a hint."""
    with one_call_at_a_time(), listening(), forgetting_private_data():
        try:
            # The order matters: joining sets variables that torch reads when it is loaded.
            with joined_ranks(config) as world:
                from post_dist.runtime.torch_modes import default_modes
                from post_dist.stages.pipeline import Pipeline

                stages = Pipeline(config, world, may_run, resume)
                with default_modes():
                    return _run_stages(stages, world, run)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", _RESUMES) from None


def _run_stages(
    stages: "Pipeline", world: "World", run: Callable[["Pipeline", "World"], _Result]
) -> _Result:
    """Run stages; leave nothing of a refused call, and raise a lost rank as an error."""
    try:
        return run(stages, world)
    except (InputError, ArtifactRefused, PrivacyRefused):
        if world.is_main:
            stages.inputs.discard_student()
        raise
    except Interrupted:
        # All ranks have agreed to stop, so all of them come here. One may have been ended.
        with suppress(RuntimeError):
            leave_ranks()
        raise
    except RuntimeError as error:
        # A collective that loses its connection raises a RuntimeError. Any other RuntimeError
        # is a bug of this package, and its traceback is needed.
        if not world.lost_a_rank(error):
            raise
        # It has left because it was asked to stop, as this rank was.
        if was_requested():
            raise stopped("another rank has left") from None
        raise EnvironmentFault(
            "another rank has left, or cannot be reached",
            f"look at the log of that rank; {_RESUMES}",
        ) from None


def _student_result(folder: "RunFolder") -> StudentResult:
    # The manifest is this run's own, so the student's weights are not hashed again.
    manifest = json.loads((folder.artifact / FILE_NAME).read_text())
    return StudentResult(folder.path, folder.artifact, manifest["config"]["held_out"])


def _prompt_result(folder: "RunFolder", student: Path | None = None) -> PromptResult:
    from post_dist.admission.door import check_prompt
    from post_dist.admission.quarantine import quarantined
    from post_dist.admission.refusal import refusing

    # All checks run: a prompt that was changed after tuning is refused.
    with refusing(folder.artifact), quarantined(folder.artifact) as inside:
        prompt = check_prompt(inside, "soft prompt")
    delta = None if prompt.privacy is None else prompt.privacy["delta"]
    effect = prompt.manifest.config.get("effect_on_public_text", {})
    return PromptResult(folder.path, folder.artifact, prompt.epsilon, delta, effect, student)


def _evaluation_result(folder: "RunFolder", *, with_report: bool) -> EvaluationResult:
    from post_dist.report import read_table, write_report

    table = read_table(folder.path)
    report = write_report(folder.path) if with_report else None
    return EvaluationResult(folder.path, folder.artifact, table, report)
