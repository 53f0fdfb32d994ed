"""Loading in this process what `verify --load` loads in one of its own, which takes seconds to start."""

import json
from collections.abc import Mapping

from cogtools.verification import child, load_child, model_load_child


def ask_here(module: str, question: Mapping[str, object], what: str) -> dict[str, object]:
    """The answer of the process that loads a LoRA or a model, given in this one."""
    answers = {load_child.__name__: load_child.answer, model_load_child.__name__: model_load_child.answer}
    assert what
    answer: dict[str, object] = json.loads(json.dumps(answers[module](json.loads(json.dumps(question)))))
    return answer


def answer_here() -> None:
    """Have all that is asked for from now on answered in this process."""
    child.ask = ask_here
