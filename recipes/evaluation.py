"""What a recipe may say about measuring."""

from typing import Annotated

from pydantic import Field, model_validator

from linearize.recipes.fields import Positive, Section


class CopyingSection(Section):
    """Texts of `length` tokens, each said twice."""

    texts: Positive = 4
    length: Annotated[int, Field(ge=2)] = 512


class EvaluateSection(Section):
    """Measurements on the held-out data.

    Attributes:
        tokens: of held-out text, from which everything is made.
        lengths: of the windows in which perplexity is measured; models in between are measured at the first alone. Of
            models that learn from examples, where their texts are cut.
        examples: that are measured at most, of models that learn from such.
        copying: whether a text that stood there before is predicted; None leaves it out.
        passkey: lengths of text in which a pass key is to be found again.
        recall: numbers of `key: value` pairs of which the values are asked.
        speed: lengths of context after which the softmax model and the final one are timed, and their caches weighed.
        baselines: measure the untouched softmax model and its untrained window as well.
        tuned_teacher: measure the softmax model finetuned by the recipe's section `finetune` as well.
    """

    tokens: Positive = 8192
    lengths: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = [1024]
    examples: Positive = 1000
    copying: CopyingSection | None = CopyingSection()
    passkey: list[Positive] = []
    recall: list[Positive] = []
    speed: list[Positive] = []
    baselines: bool = True
    tuned_teacher: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateSection":
        wanted = [(name, 1, length) for name in ("lengths", "passkey") for length in getattr(self, name)]
        if self.copying is not None:
            wanted.append(("copying", self.copying.texts, self.copying.length))
        for name, count, length in wanted:
            if count * length > self.tokens:
                times = "" if count == 1 else f"{count} times "
                raise ValueError(f"{name}: {times}{length} tokens are more than the {self.tokens} to measure on")
        return self
