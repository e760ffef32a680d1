"""Measuring processes without a process, and what writes and reads in them."""

from functools import partial

from compress.benchmark import quality
from compress.benchmark.messages import Load
from compress.benchmark.quality import Reader
from compress.benchmark.worker import Worker
from compress.engines.transformers import reading
from compress.engines.transformers.batching import Batches
from compress.engines.transformers.generation import Writer
from compress.methods import quiet
from compress.model.source import Source
from compress.recipe import Generation
from compress.structure import context_length


def loaded(folder, task, device="cpu", dtype="auto", runtime=None):
    """A worker with a model in transformers, and what it told of it."""
    worker = Worker()
    return worker, worker.load(quiet, Load(Source(str(folder), task, dtype), device, 1, runtime=runtime or {}))


def reader(model, tokenizer, **options):
    return Reader(tokenizer, context_length(model.config, tokenizer), model.config.is_encoder_decoder, **options)


def writer(model, tokenizer, prompts, settings):
    """What writes to texts by settings as a recipe has them."""
    settings = Generation(**settings)
    return Writer(model, tokenizer, reader(model, tokenizer).to_write(prompts, settings.max_new_tokens), settings)


def reads(bundle, tokens=24, original=None):
    """Gives pieces their likelihoods, in batches of so many tokens."""
    batches = Batches(bundle.model, tokens, quiet)
    return partial(reading.likelihoods, bundle.model, bundle.tokenizer, batches=batches, original=original)


def likelihoods(bundle, prompts, targets, tokens=24, stride=None, original=None, **options):
    return quality.likelihoods(reader(bundle.model, bundle.tokenizer, **options), prompts, targets, reads(bundle, tokens, original), stride)
