"""The settings of a metric in a recipe: how it cuts the texts that it compares."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from compress.methods import Settings
from compress.scripts import Tokenizers

DOWNLOADED = ("spm", "flores101", "flores200", "spBLEU-1K")  # sacreBLEU's, whose vocabularies it fetches when it counts


def _without_download(value: Any) -> Any:
    if value in DOWNLOADED:
        raise ValueError(f"{value} downloads a vocabulary while it counts, and nothing is fetched then; take char, which suits any script")
    return value


class Rouge(Settings):
    """How ROUGE cuts texts."""

    tokenizer: Literal["auto", "latin", "words", "characters"] = Field(
        "auto",
        description="latin is rouge-score's: English stems of a to z and digits, all else dropped. words are of any script, and in scripts"
        " without spaces characters. auto is latin where it sees nearly all of the references, else words",
    )


class Bleu(Settings):
    """How BLEU cuts texts, by sacreBLEU's tokenizers."""

    tokenizer: Annotated[
        Literal["auto", "13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab"], BeforeValidator(_without_download)
    ] = Field(
        "auto",
        description="sacreBLEU's; auto: 13a, but zh for references in Han and char for others without spaces; ja-mecab and ko-mecab need"
        " packages of their own, the extras ja and ko",
    )


class Scoring(Settings):
    """A metric with its tokenizer, `rouge: {tokenizer: words}`."""

    rouge: Rouge | None = None
    bleu: Bleu | None = None

    @model_validator(mode="after")
    def _single(self) -> "Scoring":
        if len(self.model_fields_set) != 1:
            raise ValueError(f"each entry is one metric, as in `- rouge: {{tokenizer: words}}`; this has {len(self.model_fields_set)}")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        value = getattr(self, self.group)
        return {self.group: value and value.model_dump()}

    @property
    def group(self) -> str:
        """The metric's name."""
        return next(iter(self.model_fields_set))


def tokenizers(metrics: "list[str | Scoring]") -> Tokenizers:
    """The tokenizers that the entries name, `auto` where they name none."""
    choice = Tokenizers()
    for entry in metrics:
        if isinstance(entry, Scoring):
            choice = Tokenizers(entry.rouge.tokenizer if entry.rouge else choice.rouge, entry.bleu.tokenizer if entry.bleu else choice.bleu)
    return choice
