"""What the sections of a recipe are made of."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0)]
# YAML reads the name `18:` as a number; the names in a section are text.
TextKeys = BeforeValidator(
    lambda value: {str(key): item for key, item in value.items()} if isinstance(value, dict) else value
)


class Section(BaseModel):
    """Base of all sections: nothing unknown, nothing converted (`"8"` is no number), nothing changed later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)
