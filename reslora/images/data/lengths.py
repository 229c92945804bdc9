"""Report captions that are longer than the text encoder's limit; the text beyond the limit has no effect."""

from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from ...formatting import is_or_are, printable
from ..context import ImageContext
from ..model.loading import Model
from ..prompts import prompts_of
from .dataset import ImageDataset
from .samples import TrainingData

AT_ONCE = 1000  # captions that are tokenized in one call
Place = tuple[ImageDataset, int] | str
"""An image of a dataset, or the option that a prompt comes from."""


def print_long_captions(training_data: TrainingData, pipeline: DiffusionPipeline, context: ImageContext) -> None:
    """Print how many captions and prompts are longer than the text encoder's limit, with the longest as an example."""
    reader = reader_of(pipeline, context.model)
    if reader is None or not context.accelerator.is_main_process:
        return
    name, tokenizer = reader
    longest = context.options.training.max_sequence_length if name == context.model.family.text_parts[-1] else None
    most = longest or tokenizer.model_max_length
    places = places_of(training_data)
    texts, counts = list(places), dict[str, int]()
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        counts |= zip(some, context.model.family.token_counts(pipeline, tokenizer, some), strict=True)
        context.status.count("measuring caption", len(counts), len(texts))
    if long := [text for text in texts if counts[text] > most]:
        example = max(long, key=counts.__getitem__)
        place = places[example]
        where = place if isinstance(place, str) else place[0].name(place[1])
        reads = f"the {most} tokens that {encoder_of(name)} reads{' (--max_sequence_length)' if longest else ''}"
        those = f"{len(long)} of {len(texts)} captions and prompts {is_or_are(len(long))}"
        line = f"{those} longer than {reads}: the rest is cut off"
        context.accelerator.print(f"{line} (for example {printable(where)}: {counts[example]} tokens)")


def reader_of(pipeline: DiffusionPipeline, model: Model) -> tuple[str, PreTrainedTokenizerBase] | None:
    """Return the name of the pipeline's last tokenizer, and the tokenizer itself; None if there is none.

    The last tokenizer has the highest limit.
    """
    for name in reversed(model.family.text_parts):
        tokenizer = getattr(pipeline, name, None) if name.startswith("tokenizer") else None
        if tokenizer is not None and model.index.get(encoder_of(name)) != [None, None]:
            return name, tokenizer
    return None


def encoder_of(tokenizer: str) -> str:
    """Return the pipeline's name for the text encoder that belongs to a tokenizer."""
    return tokenizer.replace("tokenizer", "text_encoder")


def places_of(training_data: TrainingData) -> dict[str, Place]:
    """Return every caption, with prefix and suffix, and every prompt, each with the first place where it occurs."""
    found: dict[str, Place] = {}
    for source in training_data.sources:
        for index, captions in enumerate(source.images.captions):
            for text in captions:
                found.setdefault(source.transform.plain(text), (source.images, index))
    for prompt in prompts_of(training_data.validation):
        for text in filter(None, (prompt.prompt, prompt.negative_prompt)):
            found.setdefault(text, "--validation_prompt")
    return found
