"""Check the arguments of the Python API by their annotations, before a call does any work."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, ParamSpec, TypeVar

from pydantic import AfterValidator, BaseModel, InstanceOf, TypeAdapter, ValidationError

from post_dist.errors import InputError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_LIST = "a list"
_EXPECTED: Mapping[str, str] = {
    "bool_type": "True or False",
    "float_type": "a number",
    "int_type": "a whole number",
    "sequence_str": _LIST,
    "string_type": "a string",
}
"""What an argument should be, by pydantic's name of the problem."""
_EXPECTED_CLASSES: Mapping[str, str] = {
    "Path": "a path",
    "RunConfig": "a run file that `load_run` has read",
    "Sequence": _LIST,
}
_SHOWN = str | bool | None
"""Types of a wrong word that a message repeats. A number may have any length."""


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character, such as \\ud800") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
"""A text that a tokenizer takes: without half a character."""


def checked(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Refuse an argument that does not fit its annotation, before the function runs.

    Nothing is converted: `"8"` and `True` are no numbers. A generator is no list, and is not used
    up. Messages quote no text.

    Raises:
        InputError: an argument does not fit. The message says what is expected.
    """
    signature = inspect.signature(function)
    annotations = {name: each.annotation for name, each in signature.parameters.items()}
    adapters = {
        name: _adapter(annotation)
        for name, annotation in annotations.items()
        if annotation is not inspect.Parameter.empty
    }

    @wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            # `self` has no annotation.
            if name not in adapters:
                continue
            try:
                adapters[name].validate_python(value, strict=True)
            except ValidationError as error:
                raise _refusal(function.__name__, name, error) from None
        return function(*args, **kwargs)

    return call


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    # pydantic would take a mapping for a section, unchecked by the rules of a run file.
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return TypeAdapter(InstanceOf[annotation])
    return TypeAdapter(annotation)


def _refusal(function: str, name: str, error: ValidationError) -> InputError:
    """Say which argument of a function is wrong, and what is expected."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = _place(name, first)
    given = first["input"]
    if first["type"] == "value_error":
        return InputError(f"{function}: {place} {first['msg'].removeprefix('Value error, ')}")
    # There is one problem for each type of a union. Those of other places can wait.
    here = [each for each in problems if _place(name, each) == place]
    expected = " or ".join(dict.fromkeys(map(_expected, here)))
    message = f"{function}: {place} is not {expected}"
    if first["type"] == "literal_error" and isinstance(given, _SHOWN):
        message += f" (found {given!r:.60})"
    elif "than" not in first["type"]:
        message += f" (found {type(given).__name__})"
    return InputError(message, "give a list, such as [first, second]" if expected == _LIST else "")


def _place(name: str, problem: Any) -> str:
    """Return the name of an argument, with the number of an element."""
    # The other parts are pydantic's names of a union's types.
    return name + "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))


def _expected(problem: Any) -> str:
    """Say what a value should be, without its name."""
    kind = problem["type"]
    if kind == "is_instance_of":
        return _EXPECTED_CLASSES[problem["ctx"]["class"]]
    message: str = problem["msg"]
    return _EXPECTED.get(kind, message.removeprefix("Input should be "))
