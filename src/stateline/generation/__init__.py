"""Text from a model: tokenizers, sampling, and streams that go on for ever in constant memory."""

from stateline.generation.batch import generate_batch, stream_batch
from stateline.generation.engine import Engine
from stateline.generation.prompt import Prompt
from stateline.generation.request import Event, Request
from stateline.generation.sampling import GeneratedToken, History, Sampler, SamplingConfig, distribution, sample
from stateline.generation.stream import Stream, generate, generate_tokens
from stateline.generation.text import StopFilter, Utf8Decoder, stop_strings
from stateline.generation.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "generate",
    "generate_tokens",
    "generate_batch",
    "stream_batch",
    "Engine",
    "Request",
    "Event",
    "Stream",
    "Prompt",
    "SamplingConfig",
    "GeneratedToken",
    "Sampler",
    "sample",
    "distribution",
    "History",
    "ByteTokenizer",
    "JsonTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "Utf8Decoder",
    "StopFilter",
    "stop_strings",
]
