"""Run the command line with few logits in memory at once.

Small models then cut their positions into pieces, as large models do.
"""

from post_dist.cli import main
from post_dist.losses import pieces

pieces.LOGITS_AT_ONCE = 100 * 600
main()
