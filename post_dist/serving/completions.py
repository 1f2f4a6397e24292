"""Ask a vLLM server with a soft prompt: `post-dist export --to vllm` writes what this needs.

The server knows nothing of the prompt. A request carries the embeddings of the prompt and of the
text, so this side has the embeddings of all tokens, but no LLM.

Shapes: T tokens, n prompt tokens, V vocabulary, d width, C classes.
"""

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.prompt import PromptContents
from post_dist.artifacts.prompt_reader import read_task
from post_dist.data.task_reader import TaskReader
from post_dist.errors import EnvironmentFault
from post_dist.models.load import load_tokenizer
from post_dist.serving.predictions import ClassPrediction, Response, class_prediction

_EMBEDDINGS = "embeddings.safetensors"
_TASK = "task.json"
_REQUEST = "request.json"
_ROUNDING = 0.01
"""Largest difference from 1 of a sum of probabilities in half precision."""
_TOKEN = "token_id:"
"""Start of a token in the answer to a request with `return_tokens_as_token_ids`."""


class Completions:
    """Makes request bodies for vLLM's `/v1/completions`, and reads the answers.

    Args:
        folder: what `post-dist export --to vllm` wrote.

    Examples:
        >>> completions = Completions("served")                                 # doctest: +SKIP
        >>> answer = requests.post(url, json=completions.body("a text"))        # doctest: +SKIP
        >>> completions.prediction(answer.json()).label                         # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        tensors = load_file(folder / _EMBEDDINGS)
        self._prompt_nd = tensors["prompt"]
        self._table_Vd = tensors["table"]
        self._reader = TaskReader(
            read_task(folder / _TASK),
            load_tokenizer(folder),
            masked=False,
            vocabulary=len(self._table_Vd),
        )
        self._request: dict[str, Any] = json.loads((folder / _REQUEST).read_text())

    def body(self, text: str) -> dict[str, Any]:
        """Return the body of the request for a text, without the template."""
        (encoded,) = self._reader.encode([text.strip()])
        embeddings_Td = torch.cat([self._prompt_nd, self._table_Vd[encoded.token_ids]])
        return self._request | {"prompt_embeds": _encoded(embeddings_Td)}

    def prediction(self, answer: Mapping[str, Any]) -> ClassPrediction | Response:
        """Read the server's answer, which was parsed from JSON.

        Raises:
            EnvironmentFault: the server does not give the probabilities of the label words.
        """
        if not answer.get("choices"):
            raise EnvironmentFault(
                f"the server answers with an error: {_message_of(answer)}",
                "start it with --enable-prompt-embeds, and --max-logprobs of the number of label "
                "words",
            )
        choice = answer["choices"][0]
        if self._reader.generates:
            return Response(choice["text"])
        if not choice.get("logprobs"):
            raise EnvironmentFault("the server answers without log-probabilities")
        (of_first_token,) = choice["logprobs"]["top_logprobs"]
        logprobs = {int(name.removeprefix(_TOKEN)): of_first_token[name] for name in of_first_token}
        self._check_processed(logprobs)
        # Scores are means of logits. Log-probabilities differ from them by one constant.
        scores_C = []
        for ids in self._reader.verbalizer.token_ids:
            scores_C.append(sum(logprobs[token] for token in ids) / len(ids))
        return class_prediction(self._reader.task.class_names, torch.tensor(scores_C))

    def _check_processed(self, logprobs: Mapping[int, float]) -> None:
        """Check that the probabilities are those of the label words alone, with the biases."""
        words = self._request["allowed_token_ids"]
        share = sum(math.exp(logprobs.get(token, -math.inf)) for token in words)
        # Over the whole vocabulary, the label words would have less than all of the probability.
        if not logprobs.keys() >= set(words) or abs(share - 1) > _ROUNDING:
            raise EnvironmentFault(
                "the server answers with probabilities over its whole vocabulary",
                "start it with --logprobs-mode processed_logprobs",
            )


def _message_of(answer: Mapping[str, Any]) -> str:
    """Return what a server says of an error, in either of the forms that vLLM has had."""
    error = answer.get("error", answer)
    return str(error.get("message", "unknown") if isinstance(error, Mapping) else error)[:500]


def write_completions(
    folder: Path,
    prompt: PromptContents,
    tokenizer: PreTrainedTokenizerBase,
    table_Vd: torch.Tensor,
    model_name: str,
) -> None:
    """Write what `Completions` reads.

    Args:
        folder: an existing folder.
        prompt: the prompt.
        tokenizer: the tokenizer of its model.
        table_Vd: the embeddings of the model.
        model_name: name under which the server serves the model.
    """
    prompt_nd = prompt.embeddings.to(table_Vd.dtype).contiguous()
    save_file({"prompt": prompt_nd, "table": table_Vd.contiguous()}, folder / _EMBEDDINGS)
    tokenizer.save_pretrained(folder)
    (folder / _TASK).write_text(json.dumps(asdict(prompt.task), indent=2) + "\n")
    reader = TaskReader(prompt.task, tokenizer, masked=False, vocabulary=len(table_Vd))
    request = {"model": model_name, "temperature": 0} | _limits(reader)
    (folder / _REQUEST).write_text(json.dumps(request, indent=2) + "\n")


def _limits(reader: TaskReader) -> dict[str, Any]:
    """Return what a request asks for: a response, or the probability of each label word."""
    if reader.generates:
        return {"max_tokens": reader.task.max_response_length}
    tokens = sorted(set(reader.verbalizer.tokens))
    biases: dict[str, float] = {}
    # There is a bias for each class, or none.
    for ids, bias in zip(reader.verbalizer.token_ids, reader.task.class_biases, strict=False):
        biases |= {str(token): bias for token in ids}
    return {
        "max_tokens": 1,
        "allowed_token_ids": tokens,
        "logit_bias": biases,
        "logprobs": len(tokens),
        "return_tokens_as_token_ids": True,
    }


def _encoded(embeddings_Td: torch.Tensor) -> str:
    """Return a tensor as vLLM reads it."""
    buffer = io.BytesIO()
    torch.save(embeddings_Td, buffer)
    return base64.b64encode(buffer.getvalue()).decode()
