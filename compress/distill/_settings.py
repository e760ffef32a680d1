"""What the methods of distillation share in a recipe: teacher, student, and how their distributions are compared."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compress import methods
from compress.methods import About, OtherModel

Divergence = Literal["forward", "reverse", "jensen-shannon"]
DISTILLED = About(at_run_time="the model runs as the student does", calibrated=True, smaller=False, trains=True)
WRITING = replace(DISTILLED, tasks=("seq2seq", "causal-lm"))
Temperature = Annotated[float, Field(ge=0.01, le=100)]


class Student(methods.Settings):
    """What is trained in place of the model as the stage finds it."""

    id: str | None = Field(None, min_length=1, description="another model: hub id, folder (relative to the recipe), or builtin")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    config: dict[str, Any] | None = Field(
        None, min_length=1, description="fresh weights for the config of the model as the stage finds it with these keys changed"
    )

    @model_validator(mode="after")
    def _one(self) -> "Student":
        if (self.id is None) == (self.config is None):
            raise ValueError("either id or config is expected, one of the two")
        if self.config is not None and self.revision is not None:
            raise ValueError("revision is of an id; a config has none")
        return self


class DistillSettings(methods.TuneSettings):
    """The settings of every method of distillation."""

    teacher: OtherModel | None = Field(None, description="null takes the recipe's own model as it came")
    student: Student | None = Field(None, description="null takes the model as the stage finds it")

    def why_not_first(self) -> str | None:
        if self.teacher is None and self.student is None:
            return "teacher and student would be the same model, from which nothing is learned; prune before it, or give teacher or student"
        return None

    def needs(self) -> dict[str, str]:
        return {"bitsandbytes": "bnb"} if self.teacher is not None and self.teacher.bits else {}

    def models(self) -> dict[str, OtherModel]:
        named = {} if self.teacher is None else {"teacher": self.teacher}
        if self.student is not None and self.student.id is not None:
            named["student"] = OtherModel(id=self.student.id, revision=self.student.revision)
        return named


class DivergenceSettings(DistillSettings):
    """How distributions are compared."""

    divergence: Divergence = Field(
        "forward",
        description="forward is KL(teacher, student), which covers all that the teacher may write; reverse is KL(student, teacher), which"
        " keeps to its peaks; jensen-shannon is the mean of both against their mixture",
    )
    temperature: Temperature = Field(2.0, description="logits are divided by this before they become distributions")


class LogitsSettings(DivergenceSettings, methods.ShardSettings):
    """The teacher's distributions, the targets beside them."""

    logits_weight: float = Field(1.0, ge=0, description="weight of the divergence in the loss")
    label_weight: float = Field(
        0.5, ge=0, description="weight of the cross-entropy with the targets; at 0 only an encoder-decoder needs targets"
    )

    def needs_targets(self, both: bool) -> bool:
        """Whether examples need a target; an encoder-decoder's, `both`, is what says how many positions there are."""
        return self.label_weight > 0 or both

    @model_validator(mode="after")
    def _full_weights(self) -> "LogitsSettings":
        if self.shard and self.teacher is not None and self.teacher.bits:
            raise ValueError(
                f"shard: true, and teacher.bits is {self.teacher.bits}; packed weights can't be split, leave one of the two out"
            )
        return self
