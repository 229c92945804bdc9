"""Override attributes of an object inside a context."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def override_attributes(owner: object, **values: object) -> Iterator[None]:
    """Set attributes of `owner` to these values inside this context, and restore the earlier values afterwards."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
