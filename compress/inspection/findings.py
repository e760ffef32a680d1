"""What a model's layers hold, and what follows from it.

What counts as near zero depends on the root mean square (rms) of a layer's weights: below a hundredth, a tenth and a half of it. Weights
drawn from a normal distribution have 0.8, 8.0 and 38.3 % there (`NORMAL`), so only what exceeds these is a gift to pruning.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from compress.report.layers import alike, together
from compress.report.numbers import scaled
from compress.results.record import Record

if TYPE_CHECKING:
    import pandas

Kind = Literal["linear", "experts", "head", "embedding", "norm", "other", "rest"]
KINDS: dict[Kind, str] = {
    "linear": "linear layers", "experts": "experts", "embedding": "embeddings", "norm": "norms", "head": "head", "other": "others",
    "rest": "the rest (attention, ...)",
}  # fmt: skip
NORMAL = {
    "below_hundredth": math.erf(0.01 / math.sqrt(2)),
    "below_tenth": math.erf(0.1 / math.sqrt(2)),
    "below_half": math.erf(0.5 / math.sqrt(2)),
}
PLENTY = 1.5  # times what a normal distribution has, from where on small weights are remarkable
MANY_ZEROS = 0.05  # a share
WORTH_SAYING = 0.005  # a share
PACKED = 9  # bits a weight, scales included, up to which a layer counts as quantised already


class Part(Record):
    """One layer, or several taken together.

    kind                linear; experts, all of a mixture's layer; head (linear, from the last hidden state to tokens or labels); embedding;
                        norm; other (with parameters of its own); rest, which is all that has none
    parameters, bytes   its own as loaded: packed ones are counted unpacked and measured packed. Shared ones count with their first layer.
    weights             how many entries of its matrix were searched for zeros, without biases and shared weights of an earlier layer
    rms                 the root mean square of these
    zero                the share of these that is zero; the next three are the shares below 0.01, 0.1 and 0.5 of the rms, zeros included
    seconds             of one forward pass: the median over passes
    parameter_share, byte_share, time_share     of the model's
    """

    name: str
    kind: Kind
    dtype: str | None = None
    parameters: int
    bytes: int
    weights: int = 0
    rms: float | None = None
    zero: float | None = None
    below_hundredth: float | None = None
    below_tenth: float | None = None
    below_half: float | None = None
    seconds: float
    parameter_share: float
    byte_share: float
    time_share: float
    remark: str | None = None


class Inspection(Record):
    """A model that was looked at. `parts` has every layer in the model's order and the rest at the end; their shares each sum to 1.

    seconds     of a forward pass without the clocks, median
    tokens      the length of each input, and of the decoder's where there is an encoder as well
    """

    model: str
    task: str
    device: str
    dtype: str
    batch_size: int
    tokens: int
    seconds: float
    parameters: int
    bytes: int
    parts: list[Part]

    @property
    def frame(self) -> "pandas.DataFrame":
        """A row a layer, with the columns of `Part`; missing values are NA."""
        import pandas

        return pandas.DataFrame([part.model_dump() for part in self.parts], columns=list(Part.model_fields)).convert_dtypes()

    @property
    def said(self) -> list[str]:
        """Where the parameters are, where the time goes, what zeros would buy: a sentence each."""
        return [_where(self), _when(self), *_zeros(self)]

    @property
    def remarks(self) -> list[str]:
        """What is odd about layers, alike ones together."""
        groups: dict[str, dict[str, list[str]]] = {}
        for part in self.parts:
            if part.remark:
                groups.setdefault(part.remark, {}).setdefault(alike(part.name), []).append(part.name)
        return [f"{', '.join(map(together, names.values()))}: {remark}" for remark, names in groups.items()]

    def of(self, kind: Kind) -> Part | None:
        """All layers of a kind as one; None where there are none."""
        parts = [part for part in self.parts if part.kind == kind]
        return pooled(KINDS[kind], parts) if parts else None

    def whole(self) -> Part:
        """The model as one."""
        return pooled("the whole model", self.parts)

    def as_json(self) -> dict[str, object]:
        """What `--json` prints."""
        return {**self.model_dump(), "said": self.said, "remarks": self.remarks}


def grouped(parts: Sequence[Part]) -> list[tuple[Part, list[Part]]]:
    """Rows for reading, each with what is in it: linear layers that differ in numbers only, then the other kinds as a row each."""
    groups: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: list(KINDS).index(part.kind)):
        groups.setdefault(alike(part.name) if part.kind == "linear" else part.kind, []).append(part)
    return [(pooled(_title(members), members), members) for members in groups.values()]


def _title(parts: Sequence[Part]) -> str:
    """layers.*.fc1 (6 layers), norms (12 layers), lm_head (head)"""
    kind = parts[0].kind
    if kind == "linear":
        return together([part.name for part in parts])
    if kind == "rest":
        return KINDS[kind]
    return f"{KINDS[kind]} ({len(parts)} layers)" if len(parts) > 1 else f"{parts[0].name} ({kind})"


def pooled(name: str, parts: Sequence[Part]) -> Part:
    """Several parts as one: sums, and of the near-zero shares the mean by weights."""
    looked_at = [part for part in parts if part.rms is not None]
    weights = sum(part.weights for part in looked_at)

    def mean(values: Iterable[float | None]) -> float | None:
        return sum(part.weights * (value or 0) for part, value in zip(looked_at, values, strict=True)) / weights if weights else None

    square = mean(part.rms**2 if part.rms is not None else None for part in looked_at)
    return Part(
        name=name, kind=parts[0].kind, dtype=", ".join(sorted({part.dtype for part in parts if part.dtype})) or None,
        parameters=sum(part.parameters for part in parts), bytes=sum(part.bytes for part in parts), weights=weights,
        rms=None if square is None else math.sqrt(square),
        zero=mean(part.zero for part in looked_at), below_hundredth=mean(part.below_hundredth for part in looked_at),
        below_tenth=mean(part.below_tenth for part in looked_at), below_half=mean(part.below_half for part in looked_at),
        seconds=sum(part.seconds for part in parts), parameter_share=sum(part.parameter_share for part in parts),
        byte_share=sum(part.byte_share for part in parts), time_share=sum(part.time_share for part in parts),
    )  # fmt: skip


def _where(inspection: Inspection) -> str:
    """Where the parameters are, and what 4 bits would make of the linear layers."""
    shares = [
        f"{_percent(part.parameter_share)} in the {words}" for words, part in _kinds(inspection) if part.parameter_share >= WORTH_SAYING
    ]
    text = f"Of the parameters {_listed(shares)}"
    linear = inspection.of("linear")
    if linear is None:
        return f"{text}."
    text += f"; the linear layers take {scaled(linear.bytes, 'bytes')} of {scaled(inspection.bytes, 'bytes')}"
    if 8 * linear.bytes <= PACKED * linear.parameters:
        return f"{text}, {8 * linear.bytes / linear.parameters:.1f} bits a weight: they are quantised already."
    packed = linear.parameters / 2
    whole = scaled(inspection.bytes - linear.bytes + packed, "bytes")
    return f"{text}, and in 4 bits {scaled(packed, 'bytes')}, which would make the model {whole} (scales not counted)."


def _when(inspection: Inspection) -> str:
    """Where the time goes."""
    shares = [f"{_percent(part.time_share)} in the {words}" for words, part in _kinds(inspection) if part.time_share >= WORTH_SAYING]
    text = f"A forward pass over {inspection.batch_size} x {inspection.tokens} tokens takes {scaled(inspection.seconds, 's')}"
    text += f" on {inspection.device}: {_listed(shares)}"
    groups = [row for row, _ in grouped(inspection.parts) if row.kind == "linear"]
    if len(groups) > 1:
        longest = max(groups, key=lambda row: row.time_share)
        text += f"; of the linear layers {longest.name} take longest, {_percent(longest.time_share)}"
    return f"{text}."


def _zeros(inspection: Inspection) -> list[str]:
    """What pruning by size would find, and what zeros are worth."""
    linear, chance = inspection.of("linear"), NORMAL["below_tenth"]
    if linear is None or linear.below_tenth is None or linear.zero is None:
        return []
    text = f"{_percent(linear.below_tenth)} of the linear layers' weights are below a tenth of their layer's rms"
    text += f" ({_percent(chance)} in a normal distribution)"
    if linear.zero >= MANY_ZEROS:
        text += f", and {_percent(linear.zero)} are zero"
    elif linear.below_tenth > PLENTY * chance:
        text += ": pruning could take these at little loss"
    else:
        text += ": no more than by chance, so pruning soon takes weights that count"
    return [f"{text}. Zeros alone buy no speed, since dense layers multiply them like any number; removing heads, units or layers does."]


def _kinds(inspection: Inspection) -> list[tuple[str, Part]]:
    """Each kind of layer there is, in words and as one."""
    there = [(words.removeprefix("the "), inspection.of(kind)) for kind, words in KINDS.items()]
    return [(words, part) for words, part in there if part is not None]


def _listed(items: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
