"""Names of the losses in reports. A page is written without torch, which the terms load."""

METRIC_LABELS = {
    "loss": "loss",
    "ce": "KL to the teacher",
    "lm": "language-modeling loss",
    "cos": "cosine distance of hidden states",
}
"""Labels of the loss curves, by metric name in `metrics.jsonl`, in the order of drawing."""
