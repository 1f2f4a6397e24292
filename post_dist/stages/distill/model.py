"""The student with its loss as one module, and the engine that trains it.

Shapes: B sequences, T tokens, d width, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch import nn

from post_dist.config.deepspeed import training_settings
from post_dist.config.precision import Precision
from post_dist.config.schema import Distill, RunConfig, Student
from post_dist.data.order import rank_batches
from post_dist.losses.distillation import LossSettings, TermValues, distillation_loss
from post_dist.losses.heads import Heads
from post_dist.losses.pieces import step_pieces
from post_dist.losses.signals import TeacherSignal
from post_dist.losses.terms import weights_of
from post_dist.models.compiled import compile_layers
from post_dist.models.language_model import LanguageModel
from post_dist.models.lower_block import forward_above, take_out_lower_block
from post_dist.models.student import freeze
from post_dist.runtime.deepspeed_conflicts import naming_deepspeed_settings
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import make_optimizer
from post_dist.runtime.zero import train_sharded


class DistillationModel(nn.Module):
    """The student with its loss.

    Logits are computed for a few positions at a time, which needs the head several times. The loss
    is part of the module because a sharded head is gathered within the engine's forward pass.

    Args:
        student: the student.
        section: the section `distill` of the run file.
        head_is_frozen: whether the student's head is not trained.
        teacher_head: the teacher's head. Default: the student is untrained, so it has that head.
    """

    def __init__(
        self,
        student: LanguageModel,
        section: Distill,
        *,
        head_is_frozen: bool,
        teacher_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # The student's head starts as a copy of the teacher's. While frozen, it serves both models.
        # Training changes it, so a trained head needs a copy for the teacher before the first step.
        self.teacher_head = teacher_head
        if teacher_head is None and not head_is_frozen:
            self.teacher_head = copy.deepcopy(student.head_module).requires_grad_(False)
        self._section = section

    def teacher_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits [..., V] for its last hidden states [..., d].

        They come from this module's copy of the teacher's head. The teacher's own head never runs.
        """
        if self.teacher_head is None:
            return self.student.head(hidden)
        return self.student.capped(self.teacher_head(hidden))

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
        teacher: TeacherSignal,
    ) -> tuple[torch.Tensor, TermValues, torch.Tensor]:
        """Compute the loss of a micro-batch.

        Args:
            input_ids_BT: the tokens.
            labels_BT: the token that each position should predict; -100 where there is none.
            positions_BT: positions of the tokens where documents are kept apart, else None.
            teacher: the teacher's signal, each tensor [B, T, ...].

        Returns:
            The loss, its terms, and the student's last hidden states [B, T, d].
        """
        # The teacher has already run the layers of a frozen lower block.
        if teacher.below is None:
            hidden_BTd = self.student(input_ids_BT, position_ids=positions_BT)
        else:
            hidden_BTd = forward_above(self.student, teacher.below, positions_BT)
        # The loss treats every position alike, so the batch axis is dropped.
        loss, terms = distillation_loss(
            hidden_BTd.flatten(0, 1),
            teacher.map(lambda tensor: tensor.flatten(0, 1)),
            labels_BT.flatten(),
            self._heads(),
            self._loss_settings(input_ids_BT.shape[1]),
        )
        return loss, terms, hidden_BTd

    def _heads(self) -> Heads:
        # No gradient is computed for a frozen head. That saves a product as large as its forward.
        trained = []
        for parameter in self.student.head_module.parameters():
            if parameter.requires_grad:
                trained.append(parameter)
        return Heads(self.student.head, self.teacher_logits, tuple(trained))

    def _loss_settings(self, length: int) -> LossSettings:
        # All ranks must gather a sharded head equally often. The number of pieces therefore follows
        # from settings alone, not from this rank's number of sequences.
        most_positions = self._section.micro_batch_size_per_gpu * length
        return LossSettings(
            weights=weights_of(self._section),
            temperature=self._section.temperature,
            pieces=step_pieces(
                most_positions, self.student.vocabulary_size, self.student.model.device.type
            ),
            compiled=self.student.is_compiled,
        )


def student_engine(
    student: LanguageModel,
    config: RunConfig,
    student_section: Student,
    precision: Precision,
    world: World,
    teacher_head: nn.Module | None = None,
) -> Any:
    """Make the DeepSpeed engine that trains a student. All ranks call it.

    Args:
        student: the whole student on this rank's device. It is modified.
        config: the run file, for its sections `distill` and `engine`.
        student_section: the run file's section `student`.
        precision: precision of the student's weights.
        world: the ranks.
        teacher_head: the teacher's head. Default: the student is untrained, so it has that head.
    """
    section = config.distill
    # Freezing comes first, because it needs the embeddings, which are removed with the lower block.
    freeze(student, student_section)
    take_out_lower_block(student, section.layers_in_teacher(student_section))
    if config.engine.compile:
        compile_layers(student)
    if config.engine.activation_checkpointing:
        student.checkpoint_activations()

    # Only trained parameters go to the optimizer, which keeps moments for each of them.
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = make_optimizer("adamw", [{"params": trained, "lr": section.learning_rate}])
    # DeepSpeed steps the optimizer after this number of micro-batches.
    micro_batches = rank_batches(
        range(section.batch_size), section.micro_batch_size_per_gpu, world.rank, world.size
    )
    settings = training_settings(
        config.engine,
        precision,
        trained=sum(parameter.numel() for parameter in trained),
        micro_batch_size=section.micro_batch_size_per_gpu,
        accumulation_steps=len(micro_batches),
        max_grad_norm=section.max_grad_norm,
    )
    model = DistillationModel(
        student, section, head_is_frozen=student_section.freeze_head, teacher_head=teacher_head
    )
    with naming_deepspeed_settings(config.engine):
        return train_sharded(model, optimizer, settings, world)
