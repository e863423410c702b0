"""Reward functions for ``trainer: grpo``: each takes the completions and returns a number for every one."""

from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion, which is a list of messages in a conversation."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def short_words(completions: list[Any], **_: Any) -> list[float]:
    """The share of a completion's words that have at most four letters; 0 for one without words."""
    words = [text_of(completion).split() for completion in completions]
    return [sum(len(word) <= 4 for word in found) / len(found) if found else 0.0 for found in words]
