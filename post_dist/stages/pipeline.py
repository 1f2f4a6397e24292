"""The stages in their order: what each is handed, and what is finished already."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path

from post_dist.artifacts.manifest import FILE_NAME, read_manifest
from post_dist.artifacts.run_folder import RunFolder, run_folder
from post_dist.config.schema import RunConfig, Stage
from post_dist.config.sources import DataSource
from post_dist.data.public_text import load_public_texts
from post_dist.data.tasks import load_examples
from post_dist.data.template import Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError
from post_dist.files import fingerprint
from post_dist.models.load import is_masked, load_config, load_tokenizer, model_folder
from post_dist.runtime.distributed import World
from post_dist.runtime.logs import log_file
from post_dist.runtime.watchdog import unwatched
from post_dist.stages.distill.stage import distill
from post_dist.stages.evaluate.stage import ON_TARGET, Prompts, evaluate
from post_dist.stages.transfer.published import with_published_transfer
from post_dist.stages.transfer.stage import Client, transfer
from post_dist.stages.tune.stage import tune

log = logging.getLogger(__name__)

class Pipeline:
    """Finds or runs the stages of one run file. A finished one is known by its signature and never run again.

    Args:
        config: the run file.
        world: the ranks.
        may_run: the stages that this command may start; the others must be finished, or their artifacts given in `inputs`.
        resume: auto goes on from a checkpoint; never starts an unfinished stage from its beginning.
    """

    def __init__(
        self, config: RunConfig, world: World, may_run: frozenset[Stage], resume: str = "auto"
    ) -> None:
        self._config = config
        self._world = world
        self._may_run = may_run
        self._resume = resume

    def distill(self) -> RunFolder:
        """The student."""
        self._config.need("distill")
        folder = run_folder(
            self._config,
            "distill",
            {"teacher": self._teacher_digest, "corpus": self._data("corpus")},
        )
        self._run(
            [folder],
            lambda _: distill(
                folder, self.teacher, self._teacher_digest, self._world, self._resume
            ),
        )
        return folder

    def tune(self) -> RunFolder:
        """The prompt on the student."""
        return self._tune(self._config, self.student, "the student")

    def transfer(self) -> list[RunFolder]:
        """The prompt on the target, or those of several owners."""
        return self._transfer([(self._config, prompt) for prompt in self._source_prompts])

    def evaluate(self) -> RunFolder:
        """The comparison of all rows, with the baselines and the epsilons that the run file asks for.

        A data owner has no teacher: without that section the table has the student's rows.
        """
        config = self._config
        config.need("evaluate")
        if len(self._source_prompts) > 1:
            raise InputError(
                f"inputs.source_prompt names {len(self._source_prompts)} prompts, and a table is of one",
                "evaluate each by itself",
            )
        (source_prompt,) = self._source_prompts
        plans = {"": config}
        for epsilon in config.evaluate.private_rows:
            plans[f", epsilon {epsilon:g}"] = config.model_copy(
                update={"privacy": config.privacy.for_target(epsilon)}
            )
        private = {
            label: self._tune(plan, self.student, "the student").artifact
            for label, plan in plans.items()
            if label
        }
        sources = {"": source_prompt} | private
        inputs = {"student": self._student_digest, "private_task": self._data("private_task")}
        teacher, tuned = None, [Prompts(label, source, {}) for label, source in sources.items()]
        if config.teacher is not None:
            teacher, tuned = self.teacher, self._on_target(plans, sources)
            inputs = {"teacher": self._teacher_digest, **inputs}
        prompts = {
            name + each.label: path
            for each in tuned
            for name, path in {"source": each.source, **each.on_target}.items()
        }
        digests = {
            name: read_manifest(path, "soft prompt").digest for name, path in prompts.items()
        }
        folder = run_folder(config, "evaluate", inputs | digests)
        self._run(
            [folder], lambda _: evaluate(folder, teacher, self.student, tuned, inputs, self._world)
        )
        return folder

    def _on_target(
        self, plans: Mapping[str, RunConfig], sources: Mapping[str, Path]
    ) -> list[Prompts]:
        """For each plan of a table, what the run file wants to compare on the target; all transfers are trained beside each other."""
        baselines, given = self._config.evaluate.baselines, self._config.inputs.target_prompt
        wanted: dict[tuple[str, str], tuple[RunConfig, Path]] = {}
        made: dict[tuple[str, str], Path] = {}
        for label, config in plans.items():
            if given and not label:
                made[label, "transferred"] = given
            else:
                wanted[label, "transferred"] = config, sources[label]
            if "published transfer" in baselines:
                published = with_published_transfer(config)
                wanted[label, "published transfer"] = (published, sources[label])
        carried = self._transfer(list(wanted.values()))
        made |= {place: folder.artifact for place, folder in zip(wanted, carried, strict=True)}
        if "full prompt tuning" in baselines:
            made |= {
                (label, "full prompt tuning"): self._tune(
                    config, self.teacher, "the target"
                ).artifact
                for label, config in plans.items()
            }
        return [
            Prompts(
                label,
                source,
                {name: made[label, name] for name in ON_TARGET if (label, name) in made},
            )
            for label, source in sources.items()
        ]

    def everything(self) -> RunFolder:
        """All stages, after a look at all inputs: a wrong label word is found before hours of distillation."""
        self._config.need(*self._config.stages_until("evaluate"))
        self._world.on_main(partial(self._look_at_inputs, self.teacher))
        return self.evaluate()

    def _look_at_inputs(self, teacher: Path) -> None:
        """Price the plans and read the data, which also fetches those of the hub for all ranks."""
        from post_dist.privacy.accounting import account, private_plans  # takes a second

        for plan in private_plans(self._config):
            account(plan)
        tokenizer = load_tokenizer(teacher)
        task = self._config.private_task
        if task is not None and task.template is not None:
            load_examples(task, self._config.evaluate.split, "private_task")
            Template(
                task.template, tokenizer, task.max_length, masked=is_masked(load_config(teacher))
            )
            Verbalizer(
                tuple(task.labels.values()), tokenizer, allow_multi_token=task.allow_multi_token
            )
        if self._config.inputs.target_prompt is None and self._config.public_task is not None:
            load_public_texts(self._config.public_task, "public_task")

    def _tune(self, config: RunConfig, model: Path, model_name: str) -> RunFolder:
        self._config.need("tune")
        on_student = model_name == "the student"
        digest = self._student_digest if on_student else self._teacher_digest
        inputs = {"model": digest, "private_task": self._data("private_task")}
        folder = run_folder(config, "tune", inputs, label="" if on_student else "target")
        self._run(
            [folder],
            lambda _: tune(folder, model, {"model": digest}, model_name, self._world, self._resume),
        )
        return folder

    def _transfer(self, wanted: Sequence[tuple[RunConfig, Path]]) -> list[RunFolder]:
        """Carry prompts over, each by its own settings; those that are not finished, beside each other."""
        if not wanted:
            return []
        self._config.need("transfer")
        inputs = {
            "teacher": self._teacher_digest,
            "student": self._student_digest,
            "public_task": self._data("public_task"),
        }
        clients = [
            Client(
                run_folder(
                    config,
                    "transfer",
                    inputs | {"source prompt": read_manifest(prompt, "soft prompt").digest},
                ),
                prompt,
            )
            for config, prompt in wanted
        ]

        apart = {
            client.folder.path: client for client in clients
        }  # two rows of a table may ask for the same

        def carry_over(unfinished: list[RunFolder]) -> None:
            transfer(
                [apart[folder.path] for folder in unfinished],
                self.teacher,
                self.student,
                self._world,
                self._resume,
            )

        self._run([client.folder for client in apart.values()], carry_over)
        return [client.folder for client in clients]

    @cached_property
    def teacher(self) -> Path:
        """The folder of the large LLM."""
        if self._config.teacher is None:
            raise InputError("the run file lacks the section teacher")
        fetch = partial(model_folder, self._config.teacher)
        with unwatched("fetching the teacher"):  # the hub's client has time limits of its own
            self._world.on_main(fetch)
            folder = self._world.together(fetch)  # a node may have a cache of its own
        load_config(folder)
        return folder

    @cached_property
    def _teacher_digest(self) -> str:
        return self._world.on_main(partial(fingerprint, self.teacher))

    @cached_property
    def student(self) -> Path:
        """The student's folder: made here, or given in `inputs`."""
        return self._config.inputs.student or self.distill().artifact

    @cached_property
    def _student_digest(self) -> str:
        folder = self.student

        def digest() -> str:
            if (
                self._config.inputs.student and not (folder / FILE_NAME).exists()
            ):  # a model that was not cut from the teacher
                load_config(folder)
                return fingerprint(folder)
            return read_manifest(folder, "student").digest

        return self._world.on_main(digest)

    @cached_property
    def _source_prompts(self) -> tuple[Path, ...]:
        given = self._config.inputs.source_prompt
        return given if isinstance(given, tuple) else (given or self.tune().artifact,)

    def _data(self, section: str) -> str:
        """What names the contents of a data section: the file's digest, or the hub's name and commit."""
        source: DataSource = getattr(self._config, section)
        path = source.path
        if path is None:
            return f"{source.hub}@{source.revision}"

        def digest() -> str:
            if not path.is_file():
                raise InputError(
                    f"{section}.path: {path} is {'no file' if path.exists() else 'missing'}"
                )
            return fingerprint(path)

        return self._world.on_main(digest)

    def _run(self, folders: list[RunFolder], stage: Callable[[list[RunFolder]], None]) -> None:
        """Run a stage for those of its folders that are not finished."""
        unfinished = self._world.on_main(
            lambda: [folder for folder in folders if not folder.finished]
        )
        for folder in folders:
            if folder not in unfinished:
                log.info("%s is finished: %s", folder.stage, folder.path)
            elif folder.stage not in self._may_run:
                raise InputError(
                    f"{folder.stage} is not finished for these settings ({folder.path})",
                    f"run `post-dist {folder.stage}` first, or give its artifact in `inputs`",
                )
        if not unfinished:
            return
        start = time.monotonic()
        with ExitStack() as running:
            for folder in unfinished:
                self._world.on_main(partial(running.enter_context, folder.held()))
                running.enter_context(log_file(folder.path, self._world.rank))
                log.info("%s starts in %s", folder.stage, folder.path)
            stage(unfinished)
            log.info("%s is done in %.0f s", unfinished[0].stage, time.monotonic() - start)
            if self._world.is_main:
                for folder in unfinished:
                    shutil.rmtree(folder.checkpoints, ignore_errors=True)
