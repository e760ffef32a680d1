"""The calibration pass of quantisation: the kinds of grid are planned before it, and the solved layers packed behind it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from compress import experts
from compress.calibration.block import Block
from compress.calibration.walk import Storage, walk
from compress.calibration.weights import put_together
from compress.errors import ModelError
from compress.methods import Context, LayerSettings
from compress.model.loading import Bundle
from compress.quantize._bits import plan
from compress.quantize._grid import GridSettings, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Files = Callable[["PreTrainedModel", dict[str, Kind]], Storage]


def quantise(
    bundle: Bundle,
    settings: LayerSettings,
    context: Context,
    files: Files,
    solve: Callable[[Block], None],
    targets: bool = False,
    blind: bool = False,
) -> Bundle:
    """The model with every layer as `solve` sets it, stored in these files.

    Raises what `walk` and `plan` raise, and ModelError for files that hold other weights than experts in parts.
    """

    def prepare(model: "PreTrainedModel", layers: dict[str, nn.Linear]) -> Storage:
        if merged := put_together(model, bundle.source):
            raise ModelError(
                f"{type(model).__name__}: its files hold {merged[0]} in parts, which transformers can't put together where other layers are"
                " packed; methods that don't go through the calibration pass (`compress methods`) work on it"
            )
        if not isinstance(settings, GridSettings):  # whose formats hold inputs, too, and no experts
            for path, mixture in experts.parted(model):
                for name in mixture.layers():
                    if layers.pop(f"{path}.{name}", None):
                        context.leave_out(f"{path}.{name}", "the format holds no experts")
        kinds = plan(bundle, model, settings, context, layers)
        for path, mixture in experts.parted(model):
            whole = [name for name in mixture.layers() if f"{path}.{name}" not in kinds]
            if 0 < len(whole) < len(mixture.layers()):
                raise ModelError(
                    f"{path}.{whole[0]} would stay whole and others beside it be packed; experts of one layer are read all packed or none;"
                    f" name {path} under ignore, or all of them under bits"
                )
        return files(model, kinds)

    return walk(bundle, settings, context, prepare, solve, targets, blind)


def files_of(settings: GridSettings) -> Files:
    """How layers on integer grids are stored, by the settings' format."""
    from compress.quantize._gptq_files import GptqFiles
    from compress.quantize._pack import Packed

    return GptqFiles if settings.format == "gptq" else Packed
