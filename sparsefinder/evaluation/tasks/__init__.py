"""What `evaluate` asks a model: words, what a text is turned into, or a task with labels.

Words are those behind masks, the next ones, or those of a damaged text as it was, by the kind of the model (`OF_KINDS`).

A task with labels is one file (`LabelledTask` says what it must have) and its name in `LABELLED`. Its head is finetuned once,
on the run's finetuned model under the model's own attention; every variant of it is then measured on the same examples.
"""

from sparsefinder.errors import UserError
from sparsefinder.evaluation.tasks.data import LabelledData
from sparsefinder.evaluation.tasks.embedding import States, ask_states
from sparsefinder.evaluation.tasks.heads import HeadSettings
from sparsefinder.evaluation.tasks.judges import Judge, MaskedWords, inputs_of
from sparsefinder.evaluation.tasks.labelled import Asked, LabelledTask, Request, ask
from sparsefinder.evaluation.tasks.language import ask_words
from sparsefinder.evaluation.tasks.next_words import NextWords
from sparsefinder.evaluation.tasks.question_answering import QuestionAnswering
from sparsefinder.evaluation.tasks.sequence_classification import SequenceClassification
from sparsefinder.evaluation.tasks.token_classification import TokenClassification

__all__ = [
    "CAUSAL_LM",
    "EMBEDDING",
    "LABELLED",
    "MASKED_LM",
    "OF_KINDS",
    "SEQ2SEQ_LM",
    "TASKS",
    "WORDS",
    "Asked",
    "HeadSettings",
    "Judge",
    "LabelledData",
    "LabelledTask",
    "MaskedWords",
    "NextWords",
]
__all__ += ["Request", "States", "ask", "ask_states", "ask_words", "check", "inputs_of"]

MASKED_LM = "masked_lm"
CAUSAL_LM = "causal_lm"
SEQ2SEQ_LM = "seq2seq_lm"
EMBEDDING = "embedding"  # also where there is no head to ask
LABELLED: dict[str, LabelledTask] = {
    task.name: task for task in (SequenceClassification(), TokenClassification(), QuestionAnswering())
}
OF_KINDS: dict[str, str] = {"encoder": MASKED_LM, "decoder": CAUSAL_LM, "encoder_decoder": SEQ2SEQ_LM}
WORDS = tuple(OF_KINDS.values())
TASKS = (*WORDS, EMBEDDING, *LABELLED)


def check(name: str) -> None:
    """Raise a `UserError` for a task that there is not."""
    if name not in TASKS:
        raise UserError(f"evaluate.task={name} is unknown; choose one of {', '.join(TASKS)}")
