"""The command line with few logits alive at once, so that small models cut their positions into pieces as large ones do."""

from post_dist.losses import distillation as losses
from post_dist.cli import main

losses.LOGITS_AT_ONCE = 100 * 600
main()
