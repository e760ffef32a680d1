"""Magnitude: the weights nearest to zero become zero. No data; the baseline that wanda and sparsegpt must beat.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks". By layer every layer loses the same share; globally
the smallest weights of all layers go, which can empty one layer of an encoder-decoder and leave another whole.
"""

from pydantic import model_validator

from compress.methods import Context
from compress.model.loading import Bundle
from compress.prune._smallest import ScopeSettings, layers_to_prune, note, smallest, to_zero
from compress.prune._sparse import DENSE, SparseSettings

ABOUT = DENSE


class Settings(ScopeSettings, SparseSettings):
    @model_validator(mode="after")
    def _rows(self) -> "Settings":
        if self.pattern is not None and self.scope == "global":
            raise ValueError("a pattern holds in every row, so scope: global has no place beside it")
        return self


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with the smallest weights of its linear layers set to zero.

    Raises InputError where a layer would be emptied or a pattern does not divide its rows, BrokenPromise where there are no linear layers.
    """
    from compress import experts

    experts.part(bundle.model)
    layers = layers_to_prune(bundle.model, settings, context)
    to_zero(layers, smallest(layers, settings.share, settings.scope, settings.n_of_m))
    note(layers, context)
    experts.fuse(bundle.model)
    return bundle
