"""What a run file names: models, prompts and data, each with a digest for the signatures."""

import shutil
from collections.abc import Hashable
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path

from post_dist.admission.door import admit_prompt, admit_student, check_trusted
from post_dist.admission.refusal import refusing
from post_dist.artifacts.manifest import FILE_NAME, ArtifactKind, parse_manifest
from post_dist.artifacts.prompt import SoftPromptArtifact, read_prompt
from post_dist.artifacts.run_folder import ADMITTED, SETTINGS
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import Inputs, RunConfig
from post_dist.config.sources import Corpus, DataSource
from post_dist.data.corpus_files import source_digest
from post_dist.data.private_as_public import check_not_private
from post_dist.data.public_text import load_public_texts
from post_dist.data.task_reader import TaskReader
from post_dist.data.tasks import load_examples
from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import digest_as_read, digest_of, file_digests, fingerprint
from post_dist.models.embedding_table import largest_embedding_norm
from post_dist.models.families import is_masked
from post_dist.models.load import (
    check_is_folder,
    check_is_model,
    load_tokenizer,
    model_folder,
    read_config,
    weights_digest,
)
from post_dist.paths import kind_of, reading
from post_dist.runtime.distributed import World
from post_dist.runtime.private_process import forgetting_private_data
from post_dist.runtime.watchdog import unwatched
from post_dist.stages.prompt_origin import check_norms


class RunInputs:
    """Reads what a run file names. Rank 0 checks it for all ranks, and each thing once.

    Args:
        config: the run file.
        world: the ranks.
        admitted: the inputs of a run with the same student, which has passed its checks there.
    """

    def __init__(
        self, config: RunConfig, world: World, admitted: "RunInputs | None" = None
    ) -> None:
        self._config = config
        self._admitted_there = admitted
        self._inputs = config.inputs
        self._world = world
        self._prompts: dict[Hashable, SoftPromptArtifact | ArtifactRefused] = {}
        self._largest_norm = cache(largest_embedding_norm)

    @cached_property
    def teacher(self) -> Path:
        """The folder of the large LLM.

        Raises:
            InputError: the run file has no teacher, or the model cannot be used.
        """
        if self._config.teacher is None:
            raise InputError("the run file lacks the section teacher")
        fetch = partial(model_folder, self._config.teacher)
        with unwatched("fetching the teacher"):  # the hub's client has its own time limits
            self._world.on_main(fetch)
            # Each node may have its own cache. One rank of a node asks the hub, because the hub
            # limits how often it is asked. The others find what that rank has fetched.
            self._world.together(fetch if self._world.local_rank == 0 else lambda: None)
            found = partial(model_folder, self._config.teacher, is_here=True)
            folder = self._world.together(found)
        check_is_model(folder)
        return folder

    @cached_property
    def teacher_digest(self) -> str:
        """Digest of the large LLM's files."""
        return digest_of(self._teacher_files)

    @cached_property
    def teacher_weights(self) -> str:
        """Digest of the large LLM's weights, by which a transferred prompt names it."""
        return weights_digest(self._teacher_files)

    @cached_property
    def _teacher_files(self) -> dict[str, str]:
        with unwatched("hashing the teacher"):  # a disk may take minutes for hundreds of GB
            return self._world.on_main(partial(_digests_of_model, self.teacher))

    @cached_property
    def student(self) -> Path | None:
        """The given student: an admitted copy, or the folder itself if it is trusted.

        Raises:
            ArtifactRefused: a check failed.
        """
        if self._admitted_there is not None:
            return self._admitted_there.student
        given = self._inputs.student
        # A run file may name any model of one's own as its student, such as a smaller one of the
        # teacher's family.
        if given is None or self.trusts_student:
            return given
        keys = self._inputs.trusted_keys
        return self._world.on_main(partial(admit_student, given, self._admitted, keys))

    @property
    def _admitted(self) -> Path:
        """The folder for copies of given students."""
        return self._config.output / self._config.name / ADMITTED

    def discard_student(self) -> None:
        """Remove the copy of a given student, unless a run has been started beside it.

        A refused command then leaves nothing behind.
        """
        around = self._admitted.parent
        try:
            is_begun = any(around.glob(f"*/{SETTINGS}"))
        except OSError:
            # The folder itself cannot be looked at, so nothing was written there.
            return
        if is_begun:
            return
        # A property is kept under its name once it has been read.
        copy = vars(self).get("student")
        if copy is not None and copy.parent == self._admitted:
            shutil.rmtree(copy, ignore_errors=True)
        # Another process may have put something there in the meantime.
        with suppress(OSError):
            self._admitted.rmdir()
            around.rmdir()

    @cached_property
    def trusts_student(self) -> bool:
        """Whether the given student has no manifest, and is used without a check."""
        if self._admitted_there is not None:
            return self._admitted_there.trusts_student
        return self._world.on_main(partial(_is_trusted, self._inputs))

    @cached_property
    def student_digest(self) -> str:
        """Digest of the given student: that in its manifest, or of its files without one."""
        if self.student is None:
            raise InputError("the run file lacks inputs.student")
        return self._world.on_main(partial(_digest_of_student, self.student))

    @property
    def source_prompts(self) -> tuple[Path, ...]:
        """Folders of the given prompts on the student, of one or of several owners."""
        given = self._inputs.source_prompt
        if given is None or isinstance(given, tuple):
            return given or ()
        return (given,)

    def prompt(
        self, folder: Path, model: Path, kind: ArtifactKind = "soft prompt"
    ) -> SoftPromptArtifact:
        """Read a prompt for a model. One of `inputs` comes from another party.

        Raises:
            ArtifactRefused: a check failed, and all ranks raise it.
        """
        key = (folder, model, kind)
        if key not in self._prompts:
            read = partial(self._prompt_or_refusal, folder, model, kind)
            # A refusal is a result: a rank that raised it alone would leave the others waiting.
            self._prompts[key] = self._world.on_main(read)
        found = self._prompts[key]
        if isinstance(found, ArtifactRefused):
            raise found
        return found

    def _prompt_or_refusal(
        self, folder: Path, model: Path, kind: ArtifactKind
    ) -> SoftPromptArtifact | ArtifactRefused:
        """Read a prompt, and return why it is refused if it is."""
        others = [self._inputs.public_prompt, self._inputs.target_prompt, *self.source_prompts]
        try:
            if folder not in others:
                return read_prompt(folder, kind)
            prompt = admit_prompt(folder, kind, self._inputs.trusted_keys)
            # What is too large depends on the model, which the door does not know.
            with refusing(folder):
                check_norms(prompt, self._largest_norm(model))
        except ArtifactRefused as refusal:
            return refusal
        return prompt

    def data_digest(self, section: str) -> str:
        """Identify the contents of a data section: a file's hash, or hub name and revision.

        Raises:
            PrivacyRefused: a public section names the private data.
        """
        source: DataSource | Corpus = getattr(self._config, section)
        if section != "private_task":
            private = self._config.private_task
            self._world.on_main(partial(check_not_private, private, source, section))
        if isinstance(source, Corpus):
            return self._world.on_main(partial(source_digest, source))
        if source.path is None:
            return f"{source.hub}@{source.revision}"
        return self._world.on_main(partial(_digest_of_file, source.path, section))


def _digests_of_model(folder: Path) -> dict[str, str]:
    with reading(folder):
        return file_digests(folder)


def _is_trusted(inputs: Inputs) -> bool:
    """Return whether the given student has no manifest, and is used without a check.

    Raises:
        InputError: it is not a folder.
        ArtifactRefused: it has no manifest, and the run file does not trust it.
    """
    student = inputs.student
    if student is None:
        return False
    check_is_folder(student)
    # A sender might leave the manifest out, and with it the signature.
    if inputs.trusted_keys or kind_of(student / FILE_NAME):
        return False
    check_trusted(student, trusted=inputs.trust_model)
    return True


def _digest_of_student(folder: Path) -> str:
    """Return the digest in a student's manifest, or that of its files if it has no manifest."""
    if not kind_of(folder / FILE_NAME):
        check_is_model(folder)
        return fingerprint(folder)
    # Its hashes have been compared when it was admitted.
    return parse_manifest(folder / FILE_NAME).digest


def _digest_of_file(path: Path, section: str) -> str:
    """Hash a data file.

    Raises:
        InputError: the path is missing, or is not a file.
    """
    kind = kind_of(path)
    if kind != "file":
        problem = "no file" if kind else "missing"
        raise InputError(f"{section}.path: {path} is {problem}")
    return digest_as_read(fingerprint(path), path.suffix)


def check_inputs(config: RunConfig, teacher: Path) -> None:
    """Check privacy plans, data files, templates and label words before any stage runs.

    This also downloads hub data sets for all ranks.

    Args:
        config: the run file.
        teacher: folder of the large LLM, whose tokenizer the student shares.

    Raises:
        PostDistError: an input cannot be used.
    """
    from post_dist.privacy.accounting import account  # takes a second to import
    from post_dist.privacy.calibration import private_plans

    for plan in private_plans(config):
        account(plan)

    task = config.private_task
    if task is not None and task.template is not None:
        with forgetting_private_data():
            load_examples(task, config.evaluate.split, "private_task")
            if config.tune.counts_right:
                load_examples(task, "validation", "private_task")
        prompt_task = PromptTask.of_section(task, config.tune.init_text)
        model = read_config(teacher)
        TaskReader(
            prompt_task,
            load_tokenizer(teacher),
            masked=is_masked(model),
            vocabulary=model.get_text_config().vocab_size,
        )
    if config.inputs.target_prompt is None and config.public_task is not None:
        load_public_texts(config.public_task, "public_task")
